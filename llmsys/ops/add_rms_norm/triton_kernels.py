"""Residual addition and RMSNorm in one pass, by the kernels of `rms_norm`."""

from __future__ import annotations

import torch

from llmsys.ops._triton import contiguous_like
from llmsys.ops.rms_norm.triton_kernels import launch_backward, launch_forward


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, sum = (contiguous_like(x), contiguous_like(x)) if out is None else out
    return y, sum, launch_forward(x, residual, weight, eps, weight_offset, y, sum)


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
    return launch_backward(dy, dsum, sum, weight, rstd, weight_offset, out)
