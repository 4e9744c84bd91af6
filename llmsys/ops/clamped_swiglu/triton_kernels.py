"""Clamped SwiGLU in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._activation_triton import sigmoid_both
from llmsys.ops._pointwise_triton import launch, tile_indices
from llmsys.ops._triton import contiguous_like, load, store


@triton.jit
def clamped_at(x, limit):
    """min(x, limit); NaN through."""
    return tl.where(x > limit, limit, x)


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    dim,
    gate_stride,
    up_stride,
    limit,
    alpha,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    gate = clamped_at(load(gate_ptr + row * gate_stride + col, mask), limit)
    up = load(up_ptr + row * up_stride + col, mask)
    up = tl.where(up < -limit, -limit, clamped_at(up, limit))
    sigmoid, _ = sigmoid_both(alpha * gate)
    store(y_ptr + row * dim + col, gate * sigmoid * (up + 1.0), mask)


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
    limit,
    alpha,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    dy = load(dy_ptr + row * dy_stride + col, mask)
    gate = load(gate_ptr + row * gate_stride + col, mask)
    up = load(up_ptr + row * up_stride + col, mask)
    g, u = clamped_at(gate, limit), tl.where(up < -limit, -limit, clamped_at(up, limit))
    sigmoid, complement = sigmoid_both(alpha * g)
    dgate = dy * (u + 1.0) * (sigmoid * (1.0 + alpha * g * complement))
    store(dgate_ptr + row * dim + col, tl.where(gate > limit, 0.0, dgate), mask)
    store(dup_ptr + row * dim + col, tl.where((up > limit) | (up < -limit), 0.0, dy * (g * sigmoid)), mask)


def forward(gate: Tensor, up: Tensor, limit: float, alpha: float, out: Tensor | None = None) -> Tensor:
    y = contiguous_like(gate) if out is None else out
    launch(forward_kernel, (gate, up), (y,), limit, alpha)
    return y


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, limit: float, alpha: float, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    dgate, dup = (contiguous_like(gate), contiguous_like(gate)) if out is None else out
    launch(backward_kernel, (dy, gate, up), (dgate, dup), limit, alpha)
    return dgate, dup
