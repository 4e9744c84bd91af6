"""Rotary position embedding of queries and keys: inputs, sizes, cost."""

from __future__ import annotations

from typing import Any

import torch

from llmsys.ops._cases import random
from llmsys.ops.rope import cases as rope

SMALL = (
    (0, 3, 2, 8),
    (2, 0, 3, 8),
    (2, 3, 0, 8),
    (1, 1, 1, 2),
    (2, 3, 2, 7),
    (1, 5, 3, 16),
    (3, 2, 2, 31),
    (2, 3, 5, 33),
    (1, 2, 4, 128),
    (2, 2, 1, 64),
)
LARGE = ((2, 2048, 32, 128), (4, 2048, 16, 64))
EDGES = ((2, 2048, 8, 256),)
VARIANTS: tuple[dict, ...] = ({}, {"interleaved": True}, {"rotary_fraction": 0.5, "per_sequence": True})
shape = rope.shape


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0, **variant: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Forward arguments in schema order: q of `shape` and k with a quarter of its heads, at least one, and tables."""
    q, cos, sin, interleaved = rope.inputs(shape, dtype, device, seed, **variant)
    batch, tokens, heads, head_dim = shape
    (k,) = random(seed + 1, device, ((batch, tokens, max(heads // 4, 1), head_dim), dtype))
    return q, k, cos, sin, interleaved


def traffic(
    direction: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> int:
    """Bytes that must move: q and k in and out, the tables in once; backward alike."""
    return 2 * (q.numel() + k.numel()) * q.element_size() + 2 * cos.numel() * cos.element_size()


def flops(
    direction: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> int:
    """Four products and two sums a pair."""
    return 6 * (q.shape[:-1].numel() + k.shape[:-1].numel()) * cos.shape[-1]
