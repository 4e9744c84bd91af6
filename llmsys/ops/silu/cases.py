"""SiLU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._activation_cases import EDGES, LARGE, SMALL, unary as inputs, unary_traffic as traffic

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

VARIANTS: tuple[dict, ...] = ({}, {"scale": 40.0})


def flops(direction: str, x: torch.Tensor) -> int:
    """Forward: a sigmoid (counted as four) and a product an element; backward, ten."""
    return {"forward": 5, "backward": 10}[direction] * x.numel()
