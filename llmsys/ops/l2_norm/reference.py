"""Rows of length one in plain PyTorch."""

from __future__ import annotations

import torch


def forward(x: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, length): see `llmsys.l2_norm`."""
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    y = (s * length.clamp_min(eps).reciprocal()).to(x.dtype).contiguous()
    return (y if out is None else out.copy_(y)), length.flatten()


def backward(
    dy: torch.Tensor, x: torch.Tensor, length: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """dx. `length` is computed anew, so that this function can itself be differentiated."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s, g = x.to(wide), dy.to(wide)
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    scale = length.clamp_min(eps).reciprocal()
    y = s * scale
    along = torch.where(length < eps, 0.0, (g * y).sum(-1, keepdim=True))
    dx = ((g - y * along) * scale).to(x.dtype).contiguous()
    return dx if out is None else out.copy_(dx)
