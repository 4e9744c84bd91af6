"""Dropout: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

SMALL = ((0, 8), (4, 0), (1, 1), (3, 7), (2, 3, 15), (5, 16), (4, 17), (33, 32), (2, 2, 33), (3, 129), (2, 4100))
LARGE = ((4096, 4096), (2048, 2048))
EDGES = ((4096, 4097), (1, 1))
VARIANTS: tuple[dict, ...] = (
    {},
    {"p": 0.0},
    {"offset": 5},
    {"offset": 2**34 - 18, "dropout_seed": -1},  # the counter's low word overflows on the way
)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    p: float = 0.3,
    dropout_seed: int = 0x0123_4567_89AB_CDEF,
    offset: int = 0,
) -> tuple[torch.Tensor, float, int, int]:
    """Forward arguments in schema order: x of `shape`, and which of its elements are dropped."""
    (x,) = random(seed, device, (shape, dtype))
    return x, p, dropout_seed, offset


def traffic(direction: str, x: torch.Tensor, p: float, seed: int, offset: int) -> int:
    """Bytes that must move: x in and y out; backward alike."""
    return 2 * x.numel() * x.element_size()


def flops(direction: str, x: torch.Tensor, p: float, seed: int, offset: int) -> int:
    """One product an element; the words are integer arithmetic."""
    return x.numel()
