"""Rows of length one in Triton. A program holds whole rows in registers where they fit (HELD), else reads them twice,
the second time from the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._native import grouped_rows
from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, row_start, store
from llmsys.ops.rms_norm.triton_kernels import LOOP_BLOCK, tile

HELD_DIM = 4096  # longer rows are looped over


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    length_ptr,
    rows,
    dim,
    inner,
    x_stride,
    x_outer_stride,
    eps,
    HELD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_DIM)[None, :]
    x_ptr += row_start(row, inner, x_stride, x_outer_stride)
    y_ptr += row * dim
    if HELD:
        x = load(x_ptr + col, (row < rows) & (col < dim))
        squares = x * x
    else:
        squares = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
        for start in range(0, dim, BLOCK_DIM):
            x = load(x_ptr + start + col, (row < rows) & (start + col < dim))
            squares += x * x
    length = tl.sqrt_rn(tl.sum(squares, axis=1, keep_dims=True))
    tl.store(length_ptr + row, length, mask=row < rows)
    scale = tl.div_rn(1.0, tl.where(length < eps, eps, length))  # a NaN stays
    if HELD:
        store(y_ptr + col, x * scale, (row < rows) & (col < dim))
    else:
        for start in range(0, dim, BLOCK_DIM):
            mask = (row < rows) & (start + col < dim)
            store(y_ptr + start + col, load(x_ptr + start + col, mask) * scale, mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    x_ptr,
    length_ptr,
    dx_ptr,
    rows,
    dim,
    inner,
    dy_stride,
    dy_outer_stride,
    x_stride,
    x_outer_stride,
    eps,
    HELD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_DIM)[None, :]
    dy_ptr += row_start(row, inner, dy_stride, dy_outer_stride)
    x_ptr += row_start(row, inner, x_stride, x_outer_stride)
    dx_ptr += row * dim
    length = tl.load(length_ptr + row, mask=row < rows, other=1.0)
    scale = tl.div_rn(1.0, tl.where(length < eps, eps, length))
    if HELD:
        mask = (row < rows) & (col < dim)
        dy = load(dy_ptr + col, mask)
        y = load(x_ptr + col, mask) * scale
        dots = dy * y
    else:
        dots = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
        for start in range(0, dim, BLOCK_DIM):
            mask = (row < rows) & (start + col < dim)
            dots += load(dy_ptr + start + col, mask) * (load(x_ptr + start + col, mask) * scale)
    along = tl.where(length < eps, 0.0, tl.sum(dots, axis=1, keep_dims=True))
    if HELD:
        store(dx_ptr + col, (dy - y * along) * scale, mask)
    else:
        for start in range(0, dim, BLOCK_DIM):
            mask = (row < rows) & (start + col < dim)
            dy = load(dy_ptr + start + col, mask)
            y = load(x_ptr + start + col, mask) * scale
            store(dx_ptr + start + col, (dy - y * along) * scale, mask)


def block(dim: int) -> tuple[bool, int, int]:
    """(HELD, BLOCK_ROWS, BLOCK_DIM)"""
    return (True, *tile(dim)) if dim <= HELD_DIM else (False, 1, LOOP_BLOCK)


def forward(x: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    y = contiguous_like(x) if out is None else out
    inner, (x, *strides) = grouped_rows(x)
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    length = torch.empty(rows, dtype=torch.float32, device=x.device)
    held, block_rows, block_dim = block(dim)
    if x.numel():
        with device_of(x):
            forward_kernel[(triton.cdiv(rows, block_rows),)](
                x, y, length, rows, dim, inner, *strides, eps, held, block_rows, block_dim,
                num_warps=num_warps(block_rows * block_dim),
            )  # fmt: skip
    return y, length


def backward(
    dy: torch.Tensor, x: torch.Tensor, length: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    dx = contiguous_like(x) if out is None else out
    inner, (dy, *dy_strides), (x, *x_strides) = grouped_rows(dy, x)
    rows, dim = length.numel(), x.shape[-1]
    held, block_rows, block_dim = block(dim)
    if x.numel():
        with device_of(x):
            backward_kernel[(triton.cdiv(rows, block_rows),)](
                dy, x, length, dx, rows, dim, inner, *dy_strides, *x_strides, eps, held, block_rows, block_dim,
                num_warps=num_warps(block_rows * block_dim),
            )  # fmt: skip
    return dx
