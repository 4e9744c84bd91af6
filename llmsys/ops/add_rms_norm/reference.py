"""Residual addition, then RMSNorm, in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops.rms_norm import reference as rms_norm


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, sum, rstd): see `llmsys.add_rms_norm`."""
    sum_ = (x + residual).contiguous()
    y, rstd = rms_norm.forward(sum_, weight, eps, weight_offset, None if out is None else out[0])
    return y, sum_ if out is None else out[1].copy_(sum_), rstd


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
    """(dx, dweight); dx is the gradient of x and of residual alike."""
    wide = torch.promote_types(sum.dtype, torch.float32)
    dx, dweight = rms_norm.backward(dy.to(wide), sum.to(wide), weight, rstd, eps, weight_offset)
    dx = (dx if dsum is None else dx + dsum.to(wide)).to(sum.dtype)
    return (dx if out is None else out.copy_(dx)), dweight
