"""ReGLU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._activation_cases import EDGES, LARGE, SMALL, glu as inputs, glu_traffic as traffic

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

VARIANTS: tuple[dict, ...] = ({}, {"scale": 40.0})


def flops(direction: str, gate: torch.Tensor, up: torch.Tensor) -> int:
    """Forward: a comparison and a product an element; backward, a comparison and three products."""
    return {"forward": 2, "backward": 4}[direction] * gate.numel()
