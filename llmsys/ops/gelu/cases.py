"""GELU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._activation_cases import EDGES, LARGE, SMALL, unary, unary_traffic as traffic

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
) -> tuple[torch.Tensor, str]:
    """Forward arguments in schema order: x and `approximate`."""
    return *unary(shape, dtype, device, seed, scale=scale), approximate


def flops(direction: str, x: torch.Tensor, approximate: str) -> int:
    """Forward: a normal distribution (counted as 29) and a product; backward, its density too."""
    return {"forward": 30, "backward": 40}[direction] * x.numel()
