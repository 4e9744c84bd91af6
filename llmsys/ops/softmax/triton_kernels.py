"""Softmax of rows in Triton. A program holds whole rows in registers where they fit (HELD), else reads them three
times, all but the first from the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._activation_triton import exp_negative
from llmsys.ops._native import grouped_rows
from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, row_start, store
from llmsys.ops.rms_norm.triton_kernels import LOOP_BLOCK, tile

HELD_DIM = 4096  # longer rows are looped over


@triton.jit
def load_or_nothing(pointer, mask):
    return tl.where(mask, load(pointer, mask), float("-inf"))


@triton.jit
def exp_below(x, highest):
    """e^(x - highest). A NaN stays, which a maximum loses."""
    z = x - highest
    return tl.where(z == z, exp_negative(z), z)


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    rows,
    dim,
    inner,
    x_stride,
    x_outer_stride,
    HELD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_DIM)[None, :]
    x_ptr += row_start(row, inner, x_stride, x_outer_stride)
    y_ptr += row * dim
    if HELD:
        mask = (row < rows) & (col < dim)
        x = load_or_nothing(x_ptr + col, mask)
        e = exp_below(x, tl.max(x, axis=1, keep_dims=True))
        store(y_ptr + col, e * tl.div_rn(1.0, tl.sum(e, axis=1, keep_dims=True)), mask)
    else:
        highest = tl.full((BLOCK_ROWS, BLOCK_DIM), float("-inf"), tl.float32)
        for start in range(0, dim, BLOCK_DIM):
            x = load_or_nothing(x_ptr + start + col, (row < rows) & (start + col < dim))
            highest = tl.maximum(highest, x)
        highest = tl.max(highest, axis=1, keep_dims=True)
        total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
        for start in range(0, dim, BLOCK_DIM):
            x = load_or_nothing(x_ptr + start + col, (row < rows) & (start + col < dim))
            total += exp_below(x, highest)
        scale = tl.div_rn(1.0, tl.sum(total, axis=1, keep_dims=True))
        for start in range(0, dim, BLOCK_DIM):
            mask = (row < rows) & (start + col < dim)
            store(y_ptr + start + col, exp_below(load_or_nothing(x_ptr + start + col, mask), highest) * scale, mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    rows,
    dim,
    inner,
    dy_stride,
    dy_outer_stride,
    y_stride,
    y_outer_stride,
    HELD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_DIM)[None, :]
    dy_ptr += row_start(row, inner, dy_stride, dy_outer_stride)
    y_ptr += row_start(row, inner, y_stride, y_outer_stride)
    dx_ptr += row * dim
    if HELD:
        mask = (row < rows) & (col < dim)
        dy, y = load(dy_ptr + col, mask), load(y_ptr + col, mask)
        store(dx_ptr + col, y * (dy - tl.sum(dy * y, axis=1, keep_dims=True)), mask)
    else:
        products = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
        for start in range(0, dim, BLOCK_DIM):
            mask = (row < rows) & (start + col < dim)
            products += load(dy_ptr + start + col, mask) * load(y_ptr + start + col, mask)
        mean = tl.sum(products, axis=1, keep_dims=True)
        for start in range(0, dim, BLOCK_DIM):
            mask = (row < rows) & (start + col < dim)
            dy, y = load(dy_ptr + start + col, mask), load(y_ptr + start + col, mask)
            store(dx_ptr + start + col, y * (dy - mean), mask)


def block(dim: int) -> tuple[bool, int, int]:
    """(HELD, BLOCK_ROWS, BLOCK_DIM)"""
    return (True, *tile(dim)) if dim <= HELD_DIM else (False, 1, LOOP_BLOCK)


def warps(dim: int, elements: int) -> int:
    """Twice as many for rows that 16 does not divide: they are loaded by element, and each address takes registers."""
    return num_warps(elements if dim % 16 == 0 else 2 * elements)


def forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    y = contiguous_like(x) if out is None else out
    inner, (x, *strides) = grouped_rows(x)
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    held, block_rows, block_dim = block(dim)
    if x.numel():
        with device_of(x):
            forward_kernel[(triton.cdiv(rows, block_rows),)](
                x, y, rows, dim, inner, *strides, held, block_rows, block_dim,
                num_warps=warps(dim, block_rows * block_dim),
            )  # fmt: skip
    return y


def backward(dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    dx = contiguous_like(y) if out is None else out
    inner, (dy, *dy_strides), (y, *y_strides) = grouped_rows(dy, y)
    rows, dim = y.shape[:-1].numel(), y.shape[-1]
    held, block_rows, block_dim = block(dim)
    if y.numel():
        with device_of(y):
            backward_kernel[(triton.cdiv(rows, block_rows),)](
                dy, y, dx, rows, dim, inner, *dy_strides, *y_strides, held, block_rows, block_dim,
                num_warps=warps(dim, block_rows * block_dim),
            )  # fmt: skip
    return dx
