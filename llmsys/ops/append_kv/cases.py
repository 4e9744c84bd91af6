"""Appending to a cache: inputs, sizes, cost."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops._cases import random
from llmsys.ops.rope.tables import rope_tables

# A shape is (B, T, S, K, D, E): sequences, new tokens, room for tokens, key heads, head dims of k and of v.
SMALL = (
    *((0, 1, 3, 1, 8, 8), (2, 0, 5, 2, 8, 8), (1, 1, 1, 1, 1, 1), (3, 3, 4, 2, 7, 5), (1, 1, 17, 1, 16, 16)),
    *((2, 1, 33, 6, 96, 96), (2, 2, 31, 2, 33, 20), (1, 9, 30, 1, 256, 64), (5, 4, 12, 3, 34, 128)),
)
LARGE = ((64, 1, 256, 8, 128, 128), (1, 512, 1024, 8, 128, 128))
VARIANTS: tuple[dict, ...] = (
    {},
    {"rotary_fraction": 1.0},
    {"rotary_fraction": 0.5, "interleaved": True},
    {"rotary_fraction": 1.0, "per_sequence": True, "table_dtype": None},
    {"block_size": 4},
    {"int8": True},
    {"int8": True, "rotary_fraction": 1.0, "block_size": 16, "per_sequence": True},
)


def shape(*size: int) -> tuple[int, ...]:
    """The case for a (…, D) that all ops are given: as many tokens as it has rows, and room for three more."""
    *rows, dim = size
    batch, tokens = (rows[0], rows[-1]) if len(rows) > 1 else (1, rows[0])
    return batch, tokens, tokens + 3, 2, min(dim, 256), min(dim, 256)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rotary_fraction: float = 0.0,
    interleaved: bool = False,
    per_sequence: bool = False,
    table_dtype: torch.dtype | None = torch.float32,
    block_size: int = 0,  # 0: contiguous
    int8: bool = False,
) -> tuple:
    """Forward arguments in schema order: caches of zeros, of which the sequences hold unequal parts."""
    batch, tokens, room, kv_heads, dim, value_dim = shape
    k, v = random(
        *(seed, device, ((batch, tokens, kv_heads, dim), dtype), ((batch, tokens, kv_heads, value_dim), dtype)),
    )
    lengths = torch.tensor([(b + seed) % (room - tokens + 1) for b in range(batch)], dtype=torch.int32)
    table, places = None, (batch, room)
    if block_size:
        blocks = -(-room // block_size)
        table, places = (
            torch.arange(batch * blocks, 0, -1, dtype=torch.int32).view(len(lengths), blocks),
            (batch * blocks + 1, block_size),
        )
        table = table.to(device)
    kind = torch.int8 if int8 else dtype
    caches = [torch.zeros((*places, kv_heads, size), dtype=kind, device=device) for size in (dim, value_dim)]
    wide = torch.promote_types(dtype, torch.float32)
    scales: list[Tensor | None] = [
        torch.zeros((*places, kv_heads), dtype=wide, device=device) if int8 else None for _ in caches
    ]
    cos, sin = None, None
    if rotary_fraction:
        positions = torch.arange(tokens) + (lengths.unsqueeze(1) if per_sequence else 7)
        table_dtype = dtype if table_dtype is None or dtype == torch.float64 else table_dtype
        cos, sin = (x.to(device, table_dtype) for x in rope_tables(positions, 2 * int(dim * rotary_fraction / 2)))
    return k, v, *caches, *scales, lengths.to(device), table, cos, sin, interleaved


def traffic(direction: str, *args: object) -> int:
    """Bytes that must move: k and v in, the new part of the caches out."""
    k, v, k_cache, _, k_scale, *_ = args
    assert isinstance(k_cache, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    rows = k.shape[:-1].numel()
    elements = rows * (k.shape[-1] + v.shape[-1])
    return elements * (k.element_size() + k_cache.element_size()) + (0 if k_scale is None else 8 * rows)


def flops(direction: str, *args: object) -> int:
    """Of the rotation: four products and two sums a pair."""
    k, cos = args[0], args[8]
    assert isinstance(k, Tensor)
    return 6 * k.shape[:-1].numel() * cos.shape[-1] if isinstance(cos, Tensor) else 0
