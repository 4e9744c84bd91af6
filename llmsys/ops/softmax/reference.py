"""Softmax of rows in plain PyTorch."""

from __future__ import annotations

import torch


def forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """y: see `llmsys.softmax`."""
    y = torch.softmax(x.to(torch.promote_types(x.dtype, torch.float32)), -1).to(x.dtype).contiguous()
    return y if out is None else out.copy_(y)


def backward(dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """dx."""
    wide = torch.promote_types(y.dtype, torch.float32)
    g, p = dy.to(wide), y.to(wide)
    dx = (p * (g - (g * p).sum(-1, keepdim=True))).to(y.dtype).contiguous()
    return dx if out is None else out.copy_(dx)
