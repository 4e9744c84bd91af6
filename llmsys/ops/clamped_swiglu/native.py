"""Clamped SwiGLU on native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, rows_of
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """Clamped SwiGLU on `kernels`."""
    launch, launch_backward = kernels.launch("clamped_swiglu_forward"), kernels.launch("clamped_swiglu_backward")

    def forward(gate: Tensor, up: Tensor, limit: float, alpha: float, out: Tensor | None = None) -> Tensor:
        (gate, gate_stride), (up, up_stride) = rows_of(gate), rows_of(up)
        y = torch.empty_like(gate) if out is None else out
        dim = gate.shape[-1]
        launch(
            *(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel() // dim if dim else 0, dim),
            *(gate_stride, up_stride, limit, alpha, DTYPES[gate.dtype]),
        )
        return y

    def backward(
        dy: Tensor, gate: Tensor, up: Tensor, limit: float, alpha: float, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        (dy, dy_stride), (gate, gate_stride), (up, up_stride) = rows_of(dy), rows_of(gate), rows_of(up)
        dgate, dup = (torch.empty_like(gate), torch.empty_like(gate)) if out is None else out
        dim = gate.shape[-1]
        launch_backward(
            *(dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr()),
            *(gate.numel() // dim if dim else 0, dim, dy_stride, gate_stride, up_stride),
            *(limit, alpha, DTYPES[gate.dtype]),
        )
        return dgate, dup

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


CPU: Impl = implementation(_native.CPU)
