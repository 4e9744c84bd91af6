"""RMSNorm: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

SMALL = (
    (0, 8),
    (1, 1),
    (3, 7),
    (2, 3, 15),
    (5, 16),
    (4, 17),
    (7, 31),
    (33, 32),
    (2, 2, 33),
    (65, 64),
    (3, 129),
    (2, 1000),
)
LARGE = ((4096, 4096), (2048, 2048), (8192, 1024))
EDGES = ((4096, 128), (4096, 1024), (4096, 16384), (1, 1))
VARIANTS: tuple[dict, ...] = ({}, {"weight_dtype": torch.float32}, {"weight_offset": 1.0}, {"eps": 1e-2})


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    weight_dtype: torch.dtype | None = None,
) -> tuple:
    """Forward arguments in schema order: x of `shape`, weight of its last dimension."""
    if dtype == torch.float64:
        weight_dtype = None
    x, weight = random(seed, device, (shape, dtype), (shape[-1:], weight_dtype or dtype))
    return x, weight, eps, weight_offset


def traffic(direction: str, x: torch.Tensor, weight: torch.Tensor, *_: object) -> int:
    """Bytes that must move: x in and y out; backward, dy and x in and dx out. The weight stays in cache."""
    return {"forward": 2, "backward": 3}[direction] * x.numel() * x.element_size()


def flops(direction: str, x: torch.Tensor, weight: torch.Tensor, *_: object) -> int:
    """Forward: square, add, two products an element. Backward: eleven (two sums of products, dx, dweight)."""
    return {"forward": 4, "backward": 11}[direction] * x.numel()
