"""SwiGLU: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

SMALL = ((0, 8), (4, 0), (1, 1), (3, 7), (2, 3, 15), (5, 16), (4, 17), (33, 32), (2, 2, 33), (3, 129), (2, 4100))
LARGE = ((4096, 4096), (2048, 2048))
EDGES = ((4096, 4097), (1, 1))
VARIANTS: tuple[dict, ...] = ({}, {"scale": 40.0})


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward arguments in schema order: gate (times `scale`) and up, both of `shape`."""
    gate, up = random(seed, device, (shape, dtype), (shape, dtype))
    return gate * scale, up


def traffic(direction: str, gate: torch.Tensor, up: torch.Tensor) -> int:
    """Bytes that must move: gate and up in, y out; backward, dy too in, dgate and dup out."""
    return {"forward": 3, "backward": 5}[direction] * gate.numel() * gate.element_size()


def flops(direction: str, gate: torch.Tensor, up: torch.Tensor) -> int:
    """Forward: a sigmoid (counted as four) and two products an element; backward, eleven."""
    return {"forward": 6, "backward": 11}[direction] * gate.numel()
