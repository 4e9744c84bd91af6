"""GroupNorm on native kernels. There is one for the CPU only."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl
from llmsys.ops.layer_norm.native import address, contiguous, weight_type


def implementation(kernels: Kernels) -> Impl:
    """GroupNorm on `kernels`."""
    if not kernels.name.startswith("cpu"):
        kernels = replace(kernels, module=None, missing="group_norm has no CUDA kernel")
    launch, launch_backward = kernels.launch("group_norm_forward"), kernels.launch("group_norm_backward")

    def forward(
        x: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        x, weight, bias = x.contiguous(), contiguous(weight), contiguous(bias)
        mean, rstd = (kernels.floats(x.shape[0], num_groups, like=x) for _ in range(2))
        launch(
            *(x.data_ptr(), address(weight), address(bias), y.data_ptr(), mean.data_ptr(), rstd.data_ptr()),
            *(*x.shape[:2], x.shape[2:].numel(), num_groups, eps, DTYPES[x.dtype], weight_type(x, weight, bias)),
        )
        return y, mean, rstd

    def backward(
        dy: torch.Tensor,
        x: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        eps: float,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        dy, x, mean, rstd = dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
        weight, bias = contiguous(weight), contiguous(bias)
        dweight, dbias = (None if p is None else torch.empty_like(p) for p in (weight, bias))
        dweight_parts, dbias_parts = torch.empty(2, *x.shape[:2], dtype=torch.float64)
        launch_backward(
            *(dy.data_ptr(), x.data_ptr(), address(weight), mean.data_ptr(), rstd.data_ptr(), dx.data_ptr()),
            *(address(dweight), address(dbias), dweight_parts.data_ptr(), dbias_parts.data_ptr()),
            *(*x.shape[:2], x.shape[2:].numel(), num_groups, DTYPES[x.dtype], weight_type(x, weight, bias)),
        )
        return dx, dweight, dbias

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
