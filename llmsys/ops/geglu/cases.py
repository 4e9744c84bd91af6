"""GEGLU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._activation_cases import EDGES, LARGE, SMALL, glu, glu_traffic as traffic

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

VARIANTS: tuple[dict, ...] = ({}, {"scale": 40.0}, {"approximate": "tanh"}, {"scale": 4.0, "approximate": "tanh"})


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    scale: float = 1.0,
    approximate: str = "none",
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Forward arguments in schema order: gate, up and `approximate`."""
    return *glu(shape, dtype, device, seed, scale=scale), approximate


def flops(direction: str, gate: torch.Tensor, up: torch.Tensor, approximate: str) -> int:
    """Forward: a GELU (counted as 30) and a product an element; backward, its derivative and three products."""
    return {"forward": 31, "backward": 43}[direction] * gate.numel()
