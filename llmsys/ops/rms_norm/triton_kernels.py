"""RMSNorm in Triton, with an optional residual added first: the kernels of `rms_norm` and of `add_rms_norm`.

A program holds whole rows in registers and reads each once, up to a length that compiled code shows to fit. Longer rows
are looped over twice; the second reading comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._native import grouped_rows
from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, rounded, row_start, store, to_float32

TILE = 4096  # elements a program holds when rows are short: 8 warps
MAX_ROWS = 16  # in a tile: under the interpreter they are summed in order, and a longer run loses bits
LOOP_BLOCK = 4096

# Row lengths that stay in registers: what compiles without a spill for sm_80, sm_90, sm_100 and gfx942.
FORWARD_REGISTER_DIM = 16384
BACKWARD_REGISTER_BYTES = 8192  # the backward also holds its part of dweight
SCALAR_REGISTER_DIM = 4096  # rows that 16 does not divide are loaded by element, and each address takes registers
BACKWARD_WARPS_PER_SM = 16
INTERPRETED_SMS = 4


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    dim,
    inner,
    x_stride,
    x_outer_stride,
    residual_stride,
    residual_outer_stride,
    eps,
    weight_offset,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (row < rows) & (col < dim)
    weight = tl.load(weight_ptr + col, mask=col < dim, other=0.0)  # beside x, not after the sum has waited for x
    s = load(x_ptr + row_start(row, inner, x_stride, x_outer_stride) + col, mask)
    if residual_ptr is not None:
        s += load(residual_ptr + row_start(row, inner, residual_stride, residual_outer_stride) + col, mask)
        s = to_float32(rounded(s, sum_ptr.dtype.element_ty))
        store(sum_ptr + row * dim + col, s, mask)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(s * s, axis=1, keep_dims=True) / dim + eps))
    weight = to_float32(weight) + weight_offset
    store(y_ptr + row * dim + col, s * rstd * weight, mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def forward_looped_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    dim,
    inner,
    x_stride,
    x_outer_stride,
    residual_stride,
    residual_outer_stride,
    eps,
    weight_offset,
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
    squares = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        col = start + tl.arange(0, BLOCK_DIM)
        s = load(x_ptr + col, col < dim)
        if residual_ptr is not None:
            s += load(residual_ptr + col, col < dim)
            s = to_float32(rounded(s, sum_ptr.dtype.element_ty))
            store(sum_ptr + col, s, col < dim)
        squares += s * s
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=0) / dim + eps))
    tl.store(rstd_ptr + row, rstd)
    tl.debug_barrier()  # `sum` is read below by threads that may not have written it
    for start in range(0, dim, BLOCK_DIM):
        col = start + tl.arange(0, BLOCK_DIM)
        s = load(s_ptr + col, col < dim)
        weight = load(weight_ptr + col, col < dim) + weight_offset
        store(y_ptr + col, s * rstd * weight, col < dim)


@triton.jit
def backward_kernel(
    dy_ptr,
    dsum_ptr,
    s_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
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
    weight_offset,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One chunk: a run of `chunk_rows` rows, a multiple of BLOCK_ROWS. Its part of dweight stays in registers."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * chunk_rows
    col = tl.arange(0, BLOCK_DIM)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < dim)
        dy = load(dy_ptr + row_start(row, inner, dy_stride, dy_outer_stride) + col, mask)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        s = load(s_ptr + row_start(row, inner, s_stride, s_outer_stride) + col, mask)
        weight = load(weight_ptr + col, col < dim) + weight_offset
        along = tl.sum(dy * weight * s, axis=1, keep_dims=True) / dim * rstd * rstd
        dweight += dy * (s * rstd)
        dx = (dy * weight - s * along) * rstd
        if dsum_ptr is not None:
            dx += load(dsum_ptr + row_start(row, inner, dsum_stride, dsum_outer_stride) + col, mask)
        store(dx_ptr + row * dim + col, dx, mask)
    flat_col = tl.arange(0, BLOCK_DIM)
    tl.store(partial_ptr + chunk * dim + flat_col, tl.sum(dweight, axis=0), mask=flat_col < dim)


@triton.jit
def backward_looped_kernel(
    dy_ptr,
    dsum_ptr,
    s_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
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
    weight_offset,
    BLOCK_DIM: tl.constexpr,
):
    """One chunk, row by row. Its part of dweight is summed in `partial`, which no other program touches."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * chunk_rows
    partial_ptr += chunk * dim
    for row in range(first, tl.minimum(first + chunk_rows, rows)):
        rstd = tl.load(rstd_ptr + row)
        dots = tl.zeros((BLOCK_DIM,), tl.float32)
        for start in range(0, dim, BLOCK_DIM):
            col = start + tl.arange(0, BLOCK_DIM)
            dy = load(dy_ptr + row_start(row, inner, dy_stride, dy_outer_stride) + col, col < dim)
            s = load(s_ptr + row_start(row, inner, s_stride, s_outer_stride) + col, col < dim)
            weight = load(weight_ptr + col, col < dim) + weight_offset
            dots += dy * weight * s
        along = tl.sum(dots, axis=0) / dim * rstd * rstd
        tl.debug_barrier()  # `partial` is read below by threads that may not have written it
        for start in range(0, dim, BLOCK_DIM):
            col = start + tl.arange(0, BLOCK_DIM)
            dy = load(dy_ptr + row_start(row, inner, dy_stride, dy_outer_stride) + col, col < dim)
            s = load(s_ptr + row_start(row, inner, s_stride, s_outer_stride) + col, col < dim)
            weight = load(weight_ptr + col, col < dim) + weight_offset
            dx = (dy * weight - s * along) * rstd
            if dsum_ptr is not None:
                dx += load(dsum_ptr + row_start(row, inner, dsum_stride, dsum_outer_stride) + col, col < dim)
            store(dx_ptr + row * dim + col, dx, col < dim)
            dweight = tl.load(partial_ptr + col, mask=(col < dim) & (row > first), other=0.0)
            tl.store(partial_ptr + col, dweight + dy * (s * rstd), mask=col < dim)


@triton.jit
def dweight_kernel(partial_ptr, dweight_ptr, chunks, dim, BLOCK_CHUNKS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """dweight, the sum over chunks, in an order that only `chunks` decides."""
    col = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros((BLOCK_CHUNKS, BLOCK_DIM), tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)[:, None]
        mask = (chunk < chunks) & (col < dim)[None, :]
        total += tl.load(partial_ptr + chunk.to(tl.int64) * dim + col[None, :], mask=mask, other=0.0)
    store(dweight_ptr + col, tl.sum(total, axis=0), col < dim)


def dweight_tile(dim: int) -> tuple[int, int]:
    """(BLOCK_CHUNKS, BLOCK_DIM): about 128 programs, each reading at least 128 bytes of a chunk's row."""
    block_dim = min(max(triton.next_power_of_2(triton.cdiv(dim, 128)), 32), 256)
    return 2048 // block_dim, block_dim


def tile(dim: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_DIM) of a program that holds whole rows."""
    block_dim = triton.next_power_of_2(dim)
    return min(max(TILE // block_dim, 1), MAX_ROWS), block_dim


def backward_warps(elements: int, dtype: torch.dtype) -> int:
    """Warps for a tile of the backward: two 16-byte loads per thread, in float32 too, where four need 168 registers."""
    return num_warps(elements * dtype.itemsize // 2)


def forward_loops(dim: int) -> bool:
    return dim > (SCALAR_REGISTER_DIM if dim % 16 else FORWARD_REGISTER_DIM)


def backward_loops(dim: int, dtype: torch.dtype) -> bool:
    return dim > (SCALAR_REGISTER_DIM if dim % 16 else BACKWARD_REGISTER_BYTES // dtype.itemsize)


def chunk_rows(rows: int, dim: int, dtype: torch.dtype, num_sms: int) -> int:
    """Rows per program of the backward: enough programs to fill the device once, each a whole number of tiles."""
    if backward_loops(dim, dtype):
        block_rows, warps = 1, num_warps(LOOP_BLOCK)
    else:
        block_rows, block_dim = tile(dim)
        warps = backward_warps(block_rows * block_dim, dtype)
    programs = num_sms * (BACKWARD_WARPS_PER_SM // warps)
    return triton.cdiv(triton.cdiv(rows, block_rows), programs) * block_rows


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    y: torch.Tensor,
    sum: torch.Tensor | None,
) -> torch.Tensor:
    """Fill `y`, and `sum` where there is a residual; return rstd."""
    inner, (x, *x_strides), (residual, *residual_strides) = grouped_rows(x, residual)
    weight = weight.contiguous()
    dim = x.shape[-1]
    rows = x.numel() // dim
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tensors, strides = (x, residual, weight, sum, y, rstd), (inner, *x_strides, *residual_strides)
    block_rows, block_dim = tile(dim)
    with device_of(x):
        if rows == 0:
            pass
        elif forward_loops(dim):
            forward_looped_kernel[(rows,)](
                *tensors, dim, *strides, eps, weight_offset, LOOP_BLOCK, num_warps=num_warps(LOOP_BLOCK)
            )
        else:
            forward_kernel[(triton.cdiv(rows, block_rows),)](
                *tensors, rows, dim, *strides, eps, weight_offset, block_rows, block_dim,
                num_warps=num_warps(block_rows * block_dim),
            )  # fmt: skip
    return rstd


def launch_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    weight_offset: float,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight)"""
    inner, (dy, *dy_strides), (dsum, *dsum_strides), (s, *s_strides) = grouped_rows(dy, dsum, s)
    weight = weight.contiguous()
    dx = contiguous_like(s) if out is None else out
    rows, dim = rstd.numel(), s.shape[-1]
    if rows == 0:
        return dx, torch.zeros_like(weight)
    num_sms = torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else INTERPRETED_SMS
    run = chunk_rows(rows, dim, s.dtype, num_sms)
    chunks = triton.cdiv(rows, run)
    partial = torch.empty(chunks, dim, dtype=torch.float32, device=s.device)
    dweight = torch.empty_like(weight)
    tensors, strides = (dy, dsum, s, weight, rstd, dx, partial), (inner, *dy_strides, *dsum_strides, *s_strides)
    block_rows, block_dim = tile(dim)
    with device_of(s):
        if backward_loops(dim, s.dtype):
            backward_looped_kernel[(chunks,)](
                *tensors, rows, dim, run, *strides, weight_offset, LOOP_BLOCK, num_warps=num_warps(LOOP_BLOCK)
            )
        else:
            backward_kernel[(chunks,)](
                *tensors, rows, dim, run, *strides, weight_offset, block_rows, block_dim,
                num_warps=backward_warps(block_rows * block_dim, s.dtype),
            )  # fmt: skip
        block_chunks, block_dim = dweight_tile(dim)
        dweight_kernel[(triton.cdiv(dim, block_dim),)](
            partial, dweight, chunks, dim, block_chunks, block_dim, num_warps=num_warps(block_chunks * block_dim)
        )
    return dx, dweight


def forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    y = contiguous_like(x) if out is None else out
    return y, launch_forward(x, None, weight, eps, weight_offset, y, None)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_backward(dy, None, x, weight, rstd, weight_offset, out)
