"""SwiGLU in Triton: pointwise over tiles of a few rows and up to 1024 columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._native import rows_of
from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, store

TILE = 4096
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # 9 bits: its product with an exponent is exact
LN_2_LOW = tl.constexpr(-2.12194440e-4)  # ln 2 - LN_2_HIGH


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0. `tl.exp` alone is off by |x| ulp, as it rounds x * log2(e) before it raises 2 to it."""
    x = tl.maximum(x, -120.0)
    power = tl.floor(x * LOG2_E + 0.5)
    rest = (x - power * LN_2_HIGH) - power * LN_2_LOW
    return tl.exp2(rest * LOG2_E) * tl.exp2(power)


@triton.jit
def sigmoid_both(x):
    """sigmoid(x) and 1 - sigmoid(x), neither by a subtraction that cancels nor by an exp that overflows."""
    e = exp_negative(-tl.abs(x))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def tile_indices(rows, dim, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """row (BLOCK_ROWS, 1), col (1, BLOCK_DIM) and mask of this program's tile; tiles run along the rows first."""
    tiles_per_row = tl.cdiv(dim, BLOCK_DIM)
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles_per_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = program % tiles_per_row * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    return row, col, (row < rows) & (col < dim)


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    dim,
    gate_stride,
    up_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    gate = load(gate_ptr + row * gate_stride + col, mask)
    up = load(up_ptr + row * up_stride + col, mask)
    sigmoid, _ = sigmoid_both(gate)
    store(y_ptr + row * dim + col, gate * sigmoid * up, mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    rows,
    dim,
    dy_stride,
    gate_stride,
    up_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    dy = load(dy_ptr + row * dy_stride + col, mask)
    gate = load(gate_ptr + row * gate_stride + col, mask)
    up = load(up_ptr + row * up_stride + col, mask)
    sigmoid, complement = sigmoid_both(gate)
    store(dgate_ptr + row * dim + col, dy * up * (sigmoid * (1.0 + gate * complement)), mask)
    store(dup_ptr + row * dim + col, dy * (gate * sigmoid), mask)


def tile(dim: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_DIM)"""
    block_dim = min(triton.next_power_of_2(dim), 1024)
    return TILE // block_dim, block_dim


def launch(kernel: triton.JITFunction, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    """Run a pointwise kernel over inputs of equal shape into contiguous outputs."""
    if outputs[0].numel() == 0:
        return
    dim = outputs[0].shape[-1]
    rows = outputs[0].numel() // dim
    tensors, strides = zip(*(rows_of(x) for x in inputs), strict=True)
    block_rows, block_dim = tile(dim)
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(dim, block_dim)
    with device_of(tensors[0]):
        kernel[(tiles,)](*tensors, *outputs, rows, dim, *strides, block_rows, block_dim, num_warps=num_warps(TILE))


def forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    y = contiguous_like(gate) if out is None else out
    launch(forward_kernel, (gate, up), (y,))
    return y


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = (contiguous_like(gate), contiguous_like(gate)) if out is None else out
    launch(backward_kernel, (dy, gate, up), (dgate, dup))
    return dgate, dup
