"""SwiGLU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._activation_cases import EDGES, LARGE, SMALL, glu as inputs, glu_traffic as traffic

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

VARIANTS: tuple[dict, ...] = ({}, {"scale": 40.0})


def flops(direction: str, gate: torch.Tensor, up: torch.Tensor) -> int:
    """Forward: a sigmoid (counted as four) and two products an element; backward, eleven."""
    return {"forward": 6, "backward": 11}[direction] * gate.numel()
