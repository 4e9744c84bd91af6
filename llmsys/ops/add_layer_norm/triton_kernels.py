"""Residual addition and LayerNorm in one pass, by the kernels of `layer_norm`."""

from __future__ import annotations

import torch

from llmsys.ops._triton import contiguous_like
from llmsys.ops.layer_norm.triton_kernels import launch_backward, launch_forward


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, sum = (contiguous_like(x), contiguous_like(x)) if out is None else out
    return y, sum, *launch_forward(x, residual, weight, bias, eps, y, sum)


def backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    sum: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return launch_backward(dy, dsum, sum, weight, bias, mean, rstd, out)
