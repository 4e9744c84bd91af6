"""Embedding: inputs, sizes, cost. A shape is (…, D) of the result."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

SMALL = (
    (0, 8),
    (4, 0),
    (1, 1),
    (3, 7),
    (2, 3, 15),
    (50, 5),
    (5, 16),
    (4, 17),
    (2, 2, 33),
    (3, 129),
    (3, 2100),
)
LARGE = ((4096, 4096), (2048, 2048), (8192, 512))
EDGES = ((4096, 4097), (1, 1))
VARIANTS: tuple[dict, ...] = ({}, {"padding_idx": 2}, {"rows": 1}, {"rows": 40}, {"ids_dtype": torch.int32})


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int | None = None,
    padding_idx: int | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Forward arguments in schema order: a table of `rows`, by default as many as there are ids, at least 5, and ids
    for `shape`. As of words, few ids are frequent and most rows have none: the cube of a uniform number.
    """
    *lead, dim = shape
    count = torch.Size(lead).numel()
    rows = max(count, 5) if rows is None else rows
    (weight,) = random(seed, device, ((rows, dim), dtype))
    uniform = torch.rand(lead, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = (uniform**3 * rows).to(device, ids_dtype)
    return weight, ids, padding_idx


def traffic(direction: str, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None) -> int:
    """Bytes that must move: forward, the distinct rows in and y out; backward, dy in and dweight out; ids in."""
    distinct = weight.shape[0] if ids.is_meta else ids.unique().numel()
    read, written = (distinct, ids.numel()) if direction == "forward" else (ids.numel(), weight.shape[0])
    return (read + written) * weight.shape[1] * weight.element_size() + ids.numel() * ids.element_size()


def flops(direction: str, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None) -> int:
    """Backward: a sum an element."""
    return 0 if direction == "forward" else ids.numel() * weight.shape[1]
