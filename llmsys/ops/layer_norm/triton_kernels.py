"""LayerNorm in Triton, with an optional residual added first: the kernels of `layer_norm` and of `add_layer_norm`.

A program holds whole rows in registers and reads each once, up to a length that compiled code shows to fit. Longer rows
are looped over: once for the mean, once for the variance, once for the result, the last two from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._native import grouped_rows
from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, rounded, row_start, store, to_float32
from llmsys.ops.layer_norm.native import contiguous
from llmsys.ops.rms_norm.triton_kernels import (
    BACKWARD_WARPS_PER_SM,
    INTERPRETED_SMS,
    LOOP_BLOCK,
    SCALAR_REGISTER_DIM,
    dweight_kernel,
    dweight_tile,
    tile,
)

# Row lengths that stay in registers: what compiles without a spill for sm_80, sm_90, sm_100 and gfx942.
FORWARD_REGISTER_DIM = 16384
BACKWARD_REGISTER_BYTES = 16384  # the backward also holds its parts of dweight and dbias
# The compiler must not fuse `dy * weight - level`: the gradient of a row of one element is zero.
ROUNDED_PRODUCTS = {"enable_fp_fusion": False}
BACKWARD_RELOAD_DIM = tl.constexpr(2048)  # beyond, dy and x no longer fit beside these and are read again, from L1


@triton.jit
def column(pointer, col, dim, otherwise):
    """A weight or a bias: `otherwise` in every column where there is none."""
    if pointer is None:
        return otherwise
    else:
        return load(pointer + col, col < dim)


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    dim,
    inner,
    x_stride,
    x_outer_stride,
    residual_stride,
    residual_outer_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (row < rows) & (col < dim)
    s = load(x_ptr + row_start(row, inner, x_stride, x_outer_stride) + col, mask)
    if residual_ptr is not None:
        s += load(residual_ptr + row_start(row, inner, residual_stride, residual_outer_stride) + col, mask)
        s = to_float32(rounded(s, sum_ptr.dtype.element_ty))
        store(sum_ptr + row * dim + col, s, mask)
    mean = tl.sum(s, axis=1, keep_dims=True) / dim
    centred = tl.where(mask, s - mean, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=1, keep_dims=True) / dim + eps))
    y = centred * rstd * column(weight_ptr, col, dim, 1.0) + column(bias_ptr, col, dim, 0.0)
    store(y_ptr + row * dim + col, y, mask)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def forward_looped_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    dim,
    inner,
    x_stride,
    x_outer_stride,
    residual_stride,
    residual_outer_stride,
    eps,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row_start(row, inner, x_stride, x_outer_stride)
    y_ptr += row * dim
    s_ptr = x_ptr
    if residual_ptr is not None:
        residual_ptr += row_start(row, inner, residual_stride, residual_outer_stride)
        sum_ptr += row * dim
        s_ptr = sum_ptr
    total = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        col = start + tl.arange(0, BLOCK_DIM)
        s = load(x_ptr + col, col < dim)
        if residual_ptr is not None:
            s += load(residual_ptr + col, col < dim)
            s = to_float32(rounded(s, sum_ptr.dtype.element_ty))
            store(sum_ptr + col, s, col < dim)
        total += s
    mean = tl.sum(total, axis=0) / dim
    tl.debug_barrier()  # `sum` is read below by threads that may not have written it
    squares = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        col = start + tl.arange(0, BLOCK_DIM)
        centred = tl.where(col < dim, load(s_ptr + col, col < dim) - mean, 0.0)
        squares += centred * centred
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=0) / dim + eps))
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, dim, BLOCK_DIM):
        col = start + tl.arange(0, BLOCK_DIM)
        xhat = (load(s_ptr + col, col < dim) - mean) * rstd
        y = xhat * column(weight_ptr, col, dim, 1.0) + column(bias_ptr, col, dim, 0.0)
        store(y_ptr + col, y, col < dim)


@triton.jit
def backward_kernel(
    dy_ptr,
    dsum_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_parts_ptr,
    dbias_parts_ptr,
    rows,
    dim,
    chunk_rows,
    inner,
    dy_stride,
    dy_outer_stride,
    dsum_stride,
    dsum_outer_stride,
    s_stride,
    s_outer_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One chunk: a run of `chunk_rows` rows, a multiple of BLOCK_ROWS. Its parts of dweight and dbias stay in
    registers."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * chunk_rows
    col = tl.arange(0, BLOCK_DIM)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < dim)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        dy = load(dy_ptr + row_start(row, inner, dy_stride, dy_outer_stride) + col, mask)
        xhat = (load(s_ptr + row_start(row, inner, s_stride, s_outer_stride) + col, mask) - mean) * rstd
        weighted = dy * column(weight_ptr, col, dim, 1.0)
        level = tl.sum(weighted, axis=1, keep_dims=True) / dim
        along = tl.sum(weighted * xhat, axis=1, keep_dims=True) / dim
        if BLOCK_DIM > BACKWARD_RELOAD_DIM:
            tl.debug_barrier()  # else the compiler merges these loads with the first ones
            dy = load(dy_ptr + row_start(row, inner, dy_stride, dy_outer_stride) + col, mask)
            xhat = (load(s_ptr + row_start(row, inner, s_stride, s_outer_stride) + col, mask) - mean) * rstd
            weighted = dy * column(weight_ptr, col, dim, 1.0)
        if dweight_parts_ptr is not None:
            dweight += dy * xhat
        if dbias_parts_ptr is not None:
            dbias += dy
        dx = (weighted - level - xhat * along) * rstd
        if dsum_ptr is not None:
            dx += load(dsum_ptr + row_start(row, inner, dsum_stride, dsum_outer_stride) + col, mask)
        store(dx_ptr + row * dim + col, dx, mask)
    flat_col = tl.arange(0, BLOCK_DIM)
    if dweight_parts_ptr is not None:
        tl.store(dweight_parts_ptr + chunk * dim + flat_col, tl.sum(dweight, axis=0), mask=flat_col < dim)
    if dbias_parts_ptr is not None:
        tl.store(dbias_parts_ptr + chunk * dim + flat_col, tl.sum(dbias, axis=0), mask=flat_col < dim)


@triton.jit
def backward_looped_kernel(
    dy_ptr,
    dsum_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_parts_ptr,
    dbias_parts_ptr,
    rows,
    dim,
    chunk_rows,
    inner,
    dy_stride,
    dy_outer_stride,
    dsum_stride,
    dsum_outer_stride,
    s_stride,
    s_outer_stride,
    BLOCK_DIM: tl.constexpr,
):
    """One chunk, row by row. Its parts of dweight and dbias are summed in memory that no other program touches."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * chunk_rows
    for row in range(first, tl.minimum(first + chunk_rows, rows)):
        dy_row_ptr = dy_ptr + row_start(row, inner, dy_stride, dy_outer_stride)
        s_row_ptr = s_ptr + row_start(row, inner, s_stride, s_outer_stride)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        levels = tl.zeros((BLOCK_DIM,), tl.float32)
        dots = tl.zeros((BLOCK_DIM,), tl.float32)
        for start in range(0, dim, BLOCK_DIM):
            col = start + tl.arange(0, BLOCK_DIM)
            weighted = load(dy_row_ptr + col, col < dim) * column(weight_ptr, col, dim, 1.0)
            levels += weighted
            dots += weighted * ((load(s_row_ptr + col, col < dim) - mean) * rstd)
        level = tl.sum(levels, axis=0) / dim
        along = tl.sum(dots, axis=0) / dim
        tl.debug_barrier()  # the parts are read below by threads that may not have written them
        for start in range(0, dim, BLOCK_DIM):
            col = start + tl.arange(0, BLOCK_DIM)
            inside = col < dim
            dy = load(dy_row_ptr + col, inside)
            xhat = (load(s_row_ptr + col, inside) - mean) * rstd
            dx = (dy * column(weight_ptr, col, dim, 1.0) - level - xhat * along) * rstd
            if dsum_ptr is not None:
                dx += load(dsum_ptr + row_start(row, inner, dsum_stride, dsum_outer_stride) + col, inside)
            store(dx_ptr + row * dim + col, dx, inside)
            part = chunk * dim + col
            if dweight_parts_ptr is not None:
                dweight = tl.load(dweight_parts_ptr + part, mask=inside & (row > first), other=0.0)
                tl.store(dweight_parts_ptr + part, dweight + dy * xhat, mask=inside)
            if dbias_parts_ptr is not None:
                dbias = tl.load(dbias_parts_ptr + part, mask=inside & (row > first), other=0.0)
                tl.store(dbias_parts_ptr + part, dbias + dy, mask=inside)


def forward_loops(dim: int) -> bool:
    return dim > (SCALAR_REGISTER_DIM if dim % 16 else FORWARD_REGISTER_DIM)


def loop_warps(dim: int) -> int:
    """Warps of the backward that loops: twice as many where each element has its address, which takes registers."""
    return num_warps(LOOP_BLOCK * (2 if dim % 16 else 1))


def backward_loops(dim: int, dtype: torch.dtype) -> bool:
    return dim > (SCALAR_REGISTER_DIM if dim % 16 else BACKWARD_REGISTER_BYTES // dtype.itemsize)


def backward_warps(elements: int, dtype: torch.dtype) -> int:
    """Warps for a tile of the backward: one 16-byte load of bfloat16 per thread, two of float32."""
    return num_warps(elements * dtype.itemsize)


def chunk_rows(rows: int, dim: int, dtype: torch.dtype, num_sms: int) -> int:
    """Rows per program of the backward: enough programs to fill the device once, each a whole number of tiles."""
    if backward_loops(dim, dtype):
        block_rows, warps = 1, loop_warps(dim)
    else:
        block_rows, block_dim = tile(dim)
        warps = backward_warps(block_rows * block_dim, dtype)
    programs = num_sms * (BACKWARD_WARPS_PER_SM // warps)
    return triton.cdiv(triton.cdiv(rows, block_rows), programs) * block_rows


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    sum: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `y`, and `sum` where there is a residual; return mean and rstd."""
    inner, (x, *x_strides), (residual, *residual_strides) = grouped_rows(x, residual)
    weight, bias = contiguous(weight), contiguous(bias)
    dim = x.shape[-1]
    rows = x.numel() // dim
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    tensors, strides = (x, residual, weight, bias, sum, y, mean, rstd), (inner, *x_strides, *residual_strides)
    block_rows, block_dim = tile(dim)
    with device_of(x):
        if rows == 0:
            pass
        elif forward_loops(dim):
            forward_looped_kernel[(rows,)](*tensors, dim, *strides, eps, LOOP_BLOCK, num_warps=num_warps(LOOP_BLOCK))
        else:
            forward_kernel[(triton.cdiv(rows, block_rows),)](
                *tensors, rows, dim, *strides, eps, block_rows, block_dim, num_warps=num_warps(block_rows * block_dim)
            )
    return mean, rstd


def launch_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias)"""
    inner, (dy, *dy_strides), (dsum, *dsum_strides), (s, *s_strides) = grouped_rows(dy, dsum, s)
    weight, bias = contiguous(weight), contiguous(bias)
    dx = contiguous_like(s) if out is None else out
    rows, dim = rstd.numel(), s.shape[-1]
    dweight, dbias = (None if p is None else torch.zeros_like(p) for p in (weight, bias))
    if rows == 0:
        return dx, dweight, dbias
    num_sms = torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else INTERPRETED_SMS
    run = chunk_rows(rows, dim, s.dtype, num_sms)
    chunks = triton.cdiv(rows, run)
    parts = [
        None if p is None else torch.empty(chunks, dim, dtype=torch.float32, device=s.device) for p in (weight, bias)
    ]
    tensors, strides = (dy, dsum, s, weight, mean, rstd, dx, *parts), (inner, *dy_strides, *dsum_strides, *s_strides)
    block_rows, block_dim = tile(dim)
    with device_of(s):
        if backward_loops(dim, s.dtype):
            backward_looped_kernel[(chunks,)](*tensors, rows, dim, run, *strides, LOOP_BLOCK, num_warps=loop_warps(dim))
        else:
            backward_kernel[(chunks,)](
                *tensors, rows, dim, run, *strides, block_rows, block_dim,
                num_warps=backward_warps(block_rows * block_dim, s.dtype), **ROUNDED_PRODUCTS,
            )  # fmt: skip
        block_chunks, block_dim = dweight_tile(dim)
        for part, total in zip(parts, (dweight, dbias), strict=True):
            if total is not None:
                dweight_kernel[(triton.cdiv(dim, block_dim),)](
                    part, total, chunks, dim, block_chunks, block_dim, num_warps=num_warps(block_chunks * block_dim)
                )
    return dx, dweight, dbias


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = contiguous_like(x) if out is None else out
    return y, *launch_forward(x, None, weight, bias, eps, y, None)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return launch_backward(dy, None, x, weight, bias, mean, rstd, out)
