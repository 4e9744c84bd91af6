"""Residual addition, then LayerNorm, in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops.layer_norm import reference as layer_norm


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, sum, mean, rstd): see `llmsys.add_layer_norm`."""
    sum_ = (x + residual).contiguous()
    y, mean, rstd = layer_norm.forward(sum_, weight, bias, eps, None if out is None else out[0])
    return y, sum_ if out is None else out[1].copy_(sum_), mean, rstd


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
    """(dx, dweight, dbias); dx is the gradient of x and of residual alike."""
    wide = torch.promote_types(sum.dtype, torch.float32)
    dx, dweight, dbias = layer_norm.backward(dy.to(wide), sum.to(wide), weight, bias, mean, rstd, eps)
    dx = (dx if dsum is None else dx + dsum.to(wide)).to(sum.dtype)
    return (dx if out is None else out.copy_(dx)), dweight, dbias
