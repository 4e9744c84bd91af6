"""Squared ReLU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._activation_cases import EDGES, LARGE, SMALL, unary as inputs, unary_traffic as traffic

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

VARIANTS: tuple[dict, ...] = ({}, {"scale": 40.0})


def flops(direction: str, x: torch.Tensor) -> int:
    """Forward: a comparison and a square an element; backward, three."""
    return {"forward": 2, "backward": 3}[direction] * x.numel()
