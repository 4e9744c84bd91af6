"""Clamped SwiGLU in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(gate: Tensor, up: Tensor, limit: float, alpha: float, out: Tensor | None = None) -> Tensor:
    """y: see `llmsys.clamped_swiglu`."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
    y = (g * torch.sigmoid(alpha * g) * (u + 1)).to(gate.dtype).contiguous()
    return y if out is None else out.copy_(y)


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, limit: float, alpha: float, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    d, g, u = dy.to(wide), gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
    sigmoid = torch.sigmoid(alpha * g)
    dgate = d * (u + 1) * (sigmoid + alpha * g * sigmoid * (1 - sigmoid))
    dgate = dgate.masked_fill(gate > limit, 0).to(gate.dtype).contiguous()
    dup = (d * g * sigmoid).masked_fill((up > limit) | (up < -limit), 0).to(gate.dtype).contiguous()
    return (dgate, dup) if out is None else (out[0].copy_(dgate), out[1].copy_(dup))
