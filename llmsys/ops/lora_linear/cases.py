"""Linear layer with a low-rank update: inputs, sizes, cost. A shape is (…, K) of x."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

SMALL = ((0, 8), (1, 1), (3, 7), (2, 3, 15), (5, 16), (4, 17), (2, 2, 33), (3, 129))
LARGE = ((2048, 2048), (1024, 4096))
VARIANTS: tuple[dict, ...] = ({}, {"bias": False}, {"rank": 1, "scale": 2.0})


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rank: int = 16,
    columns: int | None = None,
    bias: bool = True,
    scale: float = 0.5,
) -> tuple:
    """Forward arguments in schema order: x of `shape`, a base (N, K) with N = K + 1 (large: K) unless `columns` says
    it, an update of `rank`, products of the size of x.
    """
    inner = shape[-1]
    outer = columns or (inner if inner % 64 == 0 else inner + 1)
    sizes = (shape, (outer, inner), (rank, inner), (outer, rank), (outer,))
    x, weight, lora_a, lora_b, b = random(seed, device, *((size, dtype) for size in sizes))
    return x, weight / inner**0.5, lora_a / inner**0.5, lora_b / rank**0.5, b if bias else None, scale


def traffic(direction: str, x: torch.Tensor, *others: object) -> int:
    """Bytes that must move at least: forward, x, the weights and y; backward, dy, x, the weights, dx and their own."""
    matrices = sum(t.numel() for t in others if isinstance(t, torch.Tensor))
    y = x.numel() // max(x.shape[-1], 1) * others[0].shape[0]  # type: ignore[attr-defined]
    elements = x.numel() + y + matrices if direction == "forward" else 2 * x.numel() + y + 2 * matrices
    return elements * x.element_size()


def flops(direction: str, x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, *others: object) -> int:
    """Two for each product and its sum: three matrix products forward, twice as many backward."""
    rows = x.shape[:-1].numel()
    forward = 2 * rows * (weight.numel() + len(lora_a) * sum(weight.shape))
    return forward if direction == "forward" else 2 * forward
