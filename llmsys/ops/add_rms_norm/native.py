"""Residual addition and RMSNorm on native kernels, in one pass."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, grouped_rows
from llmsys.ops._op import Impl
from llmsys.ops.rms_norm.native import backward_on


def implementation(kernels: Kernels) -> Impl:
    """add_rms_norm on `kernels`: the RMSNorm kernels with a residual."""
    launch = kernels.launch("rms_norm_forward")
    run_backward = backward_on(kernels)

    def forward(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, sum_ = out or [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
        inner, (x, *x_strides), (residual, *residual_strides) = grouped_rows(x, residual)
        weight = weight.contiguous()
        dim = x.shape[-1]
        rows = x.numel() // dim
        rstd = kernels.floats(rows, like=x)
        launch(
            *(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), sum_.data_ptr(), y.data_ptr(), rstd.data_ptr()),
            *(rows, dim, inner, *x_strides, *residual_strides, eps, weight_offset),
            *(DTYPES[x.dtype], DTYPES[weight.dtype]),
        )
        return y, sum_, rstd

    def backward(
        dy: torch.Tensor,
        dsum: torch.Tensor | None,
        sum: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return run_backward(dy, dsum, sum, weight, rstd, weight_offset, out)

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
