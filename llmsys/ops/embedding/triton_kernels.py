"""Embedding in Triton. The backward sorts the positions by id; a program sums those of one id, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._native import rows_of
from llmsys.ops._triton import device_of, load, num_warps, store
from llmsys.ops.embedding.native import int64
from llmsys.ops.embedding.reference import out_of_range

TILE = 4096


@triton.jit
def forward_kernel(
    weight_ptr,
    ids_ptr,
    y_ptr,
    count,
    rows,
    dim,
    weight_stride,
    BLOCK_IDS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)[:, None]
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    id = tl.load(ids_ptr + position, mask=position < count, other=0)
    mask = (position < count) & (d < dim)
    row = tl.load(weight_ptr + id * weight_stride + d, mask=mask & (id >= 0) & (id < rows), other=0.0)
    tl.store(y_ptr + position * dim + d, row, mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    order_ptr,
    starts_ptr,
    dweight_ptr,
    dim,
    dy_stride,
    padding_idx,
    BLOCK_DIM: tl.constexpr,
):
    id = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    mask = d < dim
    start, end = tl.load(starts_ptr + id), tl.load(starts_ptr + id + 1)
    if id == padding_idx:
        end = start
    total = tl.zeros((BLOCK_DIM,), tl.float32)
    for i in range(start, end):
        total += load(dy_ptr + tl.load(order_ptr + i) * dy_stride + d, mask)
    store(dweight_ptr + id * dim + d, total, mask)


def forward(
    weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    weight, weight_stride = rows_of(weight)
    numbers, (rows, dim) = int64(ids), weight.shape
    y = torch.empty((*ids.shape, dim), dtype=weight.dtype, device=weight.device) if out is None else out
    check(numbers, rows)
    if y.numel() == 0:
        return y
    block_dim = min(triton.next_power_of_2(dim), 1024)
    block_ids = TILE // block_dim
    grid = triton.cdiv(ids.numel(), block_ids), triton.cdiv(dim, block_dim)
    with device_of(weight):
        forward_kernel[grid](
            *(weight, numbers, y, ids.numel(), rows, dim, weight_stride, block_ids, block_dim),
            num_warps=num_warps(TILE),
        )
    return y


def backward(
    dy: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    dy, dy_stride = rows_of(dy)
    rows, dim = weight.shape
    dweight = torch.empty((rows, dim), dtype=weight.dtype, device=weight.device) if out is None else out
    if dweight.numel() == 0:
        return dweight
    numbers, order = int64(ids).flatten().sort(stable=True)
    starts = torch.searchsorted(numbers, torch.arange(rows + 1, device=ids.device))
    block_dim = min(triton.next_power_of_2(dim), TILE)
    with device_of(dy):
        backward_kernel[(rows, triton.cdiv(dim, block_dim))](
            *(dy, order, starts, dweight, dim, dy_stride, -1 if padding_idx is None else padding_idx, block_dim),
            num_warps=num_warps(block_dim),
        )
    return dweight


def check(ids: torch.Tensor, rows: int) -> None:
    """Raise IndexError where ids are at hand; on a GPU let the device's assertion do it, which nothing waits for."""
    if ids.is_cuda:
        right = ((ids >= 0) & (ids < rows)).all()
        torch._assert_async(right, f"llmsys.embedding: ids has numbers outside [0, {rows})")
    elif not ids.is_meta and (error := out_of_range(ids, rows)) is not None:
        raise error
