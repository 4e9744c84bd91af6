"""Inputs, sizes and cost of y = f(x) and of y = f(gate) · up, for any f."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops._cases import random

SMALL = ((0, 8), (4, 0), (1, 1), (3, 7), (2, 3, 15), (5, 16), (4, 17), (33, 32), (2, 2, 33), (3, 129), (2, 4100))
LARGE = ((4096, 4096), (2048, 2048))
EDGES = ((4096, 4097), (1, 1))


def unary(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, scale: float = 1.0
) -> tuple[Tensor]:
    """x of `shape`, times `scale`."""
    return (random(seed, device, (shape, dtype))[0] * scale,)


def glu(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """gate (times `scale`) and up, both of `shape`."""
    gate, up = random(seed, device, (shape, dtype), (shape, dtype))
    return gate * scale, up


def unary_traffic(direction: str, x: Tensor, *options: object) -> int:
    """Bytes that must move: x in, y out; backward, dy too in, dx out."""
    return {"forward": 2, "backward": 3}[direction] * x.numel() * x.element_size()


def glu_traffic(direction: str, gate: Tensor, up: Tensor, *options: object) -> int:
    """Bytes that must move: gate and up in, y out; backward, dy too in, dgate and dup out."""
    return {"forward": 3, "backward": 5}[direction] * gate.numel() * gate.element_size()
