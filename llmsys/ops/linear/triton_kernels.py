"""Linear in Triton: one GEMM kernel for forward, dx and dweight, which differ in strides and in what follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._activation_triton import sloped
from llmsys.ops._native import rows_of
from llmsys.ops._triton import INTERPRETED, contiguous_like, device_of, load, store, to_float32
from llmsys.ops.linear.native import matrix_of

GEMM_WARPS, NUM_WARPS = 8, 4
TILES = {torch.float32: (64, 32, 16), torch.bfloat16: (64, 64, 32), torch.float16: (64, 64, 32)}  # rows, cols, depth
RUN = tl.constexpr(128)  # products summed before the sum is added to the total: less is rounded away
GROUP = tl.constexpr(8)  # rows of tiles that run side by side, so that they find each other's tiles of B in the cache


@triton.jit
def gemm_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    residual_ptr,
    c_ptr,
    pre_ptr,
    rows,
    cols,
    depth,
    a_row_stride,
    a_k_stride,
    b_col_stride,
    b_k_stride,
    residual_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    program, tiles_down, tiles_across = tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS)
    first = program // (GROUP * tiles_across) * GROUP
    height = min(tiles_down - first, GROUP)
    inside = program % (GROUP * tiles_across)
    row = ((first + inside % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    col = (inside // height * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)[None, :]

    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for first_k in range(0, depth, RUN):
        run = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(first_k, min(first_k + RUN, depth), BLOCK_DEPTH):
            k = start + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
            across, down = k[None, :], k[:, None]
            a_mask, b_mask = (row < rows) & (across < depth), (down < depth) & (col < cols)
            a = tl.load(a_ptr + row * a_row_stride + across * a_k_stride, mask=a_mask, other=0.0)
            b = tl.load(b_ptr + down * b_k_stride + col * b_col_stride, mask=b_mask, other=0.0)
            if INTERPRETED:  # whose dot would multiply the bits of bfloat16
                a, b = to_float32(a), to_float32(b)
            if a_ptr.dtype.element_ty == tl.float32:  # those of a tile are summed one after another: fewer, then all
                run = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, run)  # Triton would make a `+` part of the dot
            else:
                run = tl.dot(a, b, run, input_precision="ieee")
        sums += run

    mask = (row < rows) & (col < cols)
    if bias_ptr is not None:
        sums += load(bias_ptr + col, col < cols)
    if pre_ptr is not None:
        store(pre_ptr + row * cols + col, sums, mask)
    if ACTIVATION is not None:
        sums, _ = sloped(sums, ACTIVATION)
    if residual_ptr is not None:
        sums += load(residual_ptr + row * residual_stride + col, mask)
    store(c_ptr + row * cols + col, sums, mask)


@triton.jit
def slope_kernel(
    dy_ptr,
    pre_ptr,
    dz_ptr,
    rows,
    cols,
    dy_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (col < cols)
    dy, pre = load(dy_ptr + row * dy_stride + col, mask), load(pre_ptr + row * cols + col, mask)
    _, slope = sloped(pre, ACTIVATION)
    store(dz_ptr + row * cols + col, dy * slope, mask)


@triton.jit
def sum_rows_kernel(dz_ptr, dbias_ptr, rows, cols, dz_stride, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        sums += load(dz_ptr + row * dz_stride + col, (row < rows) & (col < cols))
    store(dbias_ptr + col, tl.sum(sums, 0)[None, :], col < cols)


def gemm(
    shape: tuple[int, int, int],
    a: tuple[torch.Tensor, int, int],
    b: tuple[torch.Tensor, int, int],
    c: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
) -> None:
    """c = activation(a b + bias) + residual of `shape` (rows, cols, depth). `a` comes with its strides by row and along
    depth, `b` with those by column and along depth."""
    rows, cols, depth = shape
    if c.numel() == 0:
        return
    residual, residual_stride = (None, 0) if residual is None else rows_of(residual)
    block_rows, block_cols, block_depth = TILES[c.dtype]
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols)
    with device_of(c):
        gemm_kernel[(tiles,)](
            *(a[0], b[0], bias, residual, c, pre, rows, cols, depth, *a[1:], *b[1:], residual_stride),
            *(activation, block_rows, block_cols, block_depth),
            num_warps=GEMM_WARPS,
        )


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    cols, depth = weight.shape
    y = torch.empty((*x.shape[:-1], cols), dtype=x.dtype, device=x.device) if out is None else out
    pre = None if activation is None else contiguous_like(y)
    bias = None if bias is None else bias.contiguous()
    shape = (x.shape[:-1].numel(), cols, depth)
    gemm(shape, matrix_of(x), matrix_of(weight), y, bias, activation, residual, pre)
    return y, torch.empty(0, dtype=x.dtype, device=x.device) if pre is None else pre


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (cols, depth), rows = weight.shape, x.shape[:-1].numel()

    def room(needed: bool, *shape: int) -> torch.Tensor:
        return torch.empty(shape if needed else (0,), dtype=x.dtype, device=x.device)

    dx = room(needs_dx, *x.shape) if out is None or not needs_dx else out
    dweight, dbias = room(needs_dweight, cols, depth), room(needs_dbias, cols)
    dz, row_stride, col_stride = matrix_of(dy)
    if (activation is not None or needs_dbias) and col_stride != 1:
        dz, row_stride, col_stride = dy.contiguous(), cols, 1
    if activation is not None:
        dy, dy_stride, row_stride, dz = dz, row_stride, cols, room(True, rows, cols)
        if dz.numel():
            with device_of(x):
                grid = (triton.cdiv(rows, 16), triton.cdiv(cols, 128))
                slope_kernel[grid](dy, pre, dz, rows, cols, dy_stride, activation, 16, 128, num_warps=NUM_WARPS)
    (x, x_row_stride, x_col_stride), (weight, weight_row_stride, weight_col_stride) = matrix_of(x), matrix_of(weight)
    if needs_dx:
        gemm((rows, depth, cols), (dz, row_stride, col_stride), (weight, weight_col_stride, weight_row_stride), dx)
    if needs_dweight:
        gemm((cols, depth, rows), (dz, col_stride, row_stride), (x, x_col_stride, x_row_stride), dweight)
    if needs_dbias and cols:
        with device_of(x):
            sum_rows_kernel[(triton.cdiv(cols, 128),)](dz, dbias, rows, cols, row_stride, 16, 128, num_warps=NUM_WARPS)
    return dx, dweight, dbias
