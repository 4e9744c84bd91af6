"""Gradient norm on native kernels."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._flat import dense
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """Gradient norm on `kernels`."""
    launch = kernels.launch("grad_norm")

    def forward(tensors: list[torch.Tensor]) -> torch.Tensor:
        norm = torch.empty((), dtype=torch.float32, device=tensors[0].device)
        flat = dense(tensors)
        launch(
            [tensor.data_ptr() for tensor in flat],
            [tensor.numel() for tensor in flat],
            [DTYPES[tensor.dtype] for tensor in flat],
            norm.data_ptr(),
        )
        return norm

    def why_not(tensors: list[torch.Tensor]) -> str | None:
        return next((reason for tensor in tensors if (reason := kernels.why_not(tensor)) is not None), None)

    return Impl(kernels.name, forward, None, why_not, (kernels.device,))


CPU = implementation(_native.CPU)
