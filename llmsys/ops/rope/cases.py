"""Rotary position embedding: inputs, sizes, cost."""

from __future__ import annotations

import math

import torch

from llmsys.ops._cases import random
from llmsys.ops.rope.tables import rope_tables

SMALL = (
    (0, 3, 2, 8),
    (2, 0, 3, 8),
    (2, 3, 0, 8),
    (1, 1, 1, 1),
    (1, 1, 1, 2),
    (2, 3, 2, 7),
    (1, 5, 3, 16),
    (2, 4, 1, 17),
    (3, 2, 2, 31),
    (1, 7, 3, 32),
    (2, 3, 5, 33),
    (1, 3, 2, 94),
    (2, 2, 3, 128),
)
LARGE = ((2, 2048, 32, 128), (1, 8192, 8, 128), (4, 2048, 16, 64))
EDGES = ((2, 2048, 8, 256),)
VARIANTS: tuple[dict, ...] = (
    {},
    {"interleaved": True},
    {"rotary_fraction": 0.5},
    {"rotary_fraction": 0.5, "interleaved": True},
    {"per_sequence": True},
    {"table_dtype": None},
)


def shape(*sizes: int) -> tuple[int, int, int, int]:
    """(B, T, H, K) with at least as many rows as a check that every op goes through asks for by (..., K)."""
    *rows, head_dim = sizes
    return 2, 2 + math.prod(rows) // 6, 3, head_dim


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    interleaved: bool = False,
    rotary_fraction: float = 1.0,
    per_sequence: bool = False,
    table_dtype: torch.dtype | None = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Forward arguments in schema order: x of `shape`, and tables (x's dtype: None) that rotate that part of a head.

    The positions are those of one sequence, or of each sequence its own.
    """
    batch, tokens, _, head_dim = shape
    positions = torch.arange(tokens) + seed
    if per_sequence:
        positions = positions + 7 * torch.arange(batch)[:, None]
    tables = rope_tables(positions, 2 * int(head_dim * rotary_fraction / 2))
    table_dtype = dtype if table_dtype is None or dtype == torch.float64 else table_dtype
    cos, sin = (table.to(device, table_dtype) for table in tables)
    (x,) = random(seed, device, (shape, dtype))
    return x, cos, sin, interleaved


def traffic(direction: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> int:
    """Bytes that must move: x in and y out, the tables in once; backward alike."""
    return 2 * x.numel() * x.element_size() + 2 * cos.numel() * cos.element_size()


def flops(direction: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> int:
    """Four products and two sums a pair."""
    return 6 * x.shape[:-1].numel() * cos.shape[-1]
