"""Clamped SwiGLU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._activation_cases import EDGES, LARGE, SMALL, glu, glu_traffic as traffic

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

VARIANTS: tuple[dict, ...] = ({}, {"limit": 0.75, "alpha": 1.0}, {"scale": 40.0})


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    scale: float = 1.0,
    limit: float = 7.0,
    alpha: float = 1.702,
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Forward arguments in schema order."""
    return *glu(shape, dtype, device, seed, scale=scale), limit, alpha


def flops(direction: str, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float) -> int:
    """Forward: a sigmoid (counted as four), three comparisons and four more an element; backward, seventeen."""
    return {"forward": 11, "backward": 17}[direction] * gate.numel()
