"""Triton kernels of y = f(x) and of y = f(gate) · up, with the activations that they apply.

`name(…)`, of what an op takes besides tensors, is the activation's name.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._pointwise_triton import launch, tile_indices
from llmsys.ops._triton import contiguous_like, load, store

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # 9 bits: its product with an exponent is exact
LN_2_LOW = tl.constexpr(-2.12194440e-4)  # ln 2 - LN_2_HIGH
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / √(2π)


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
def sloped(x, ACTIVATION: tl.constexpr):
    """f(x) and its derivative; a kernel that stores one of them computes no more than that."""
    if ACTIVATION == "silu":
        sigmoid, complement = sigmoid_both(x)
        value, slope = x * sigmoid, sigmoid * (1.0 + x * complement)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
        value, slope = x * cdf, cdf + x * (exp_negative(-0.5 * x * x) * DENSITY_AT_0)
    elif ACTIVATION == "gelu_tanh":
        # Beyond 30 the sigmoid is 0 or 1 exactly, and x² must not become infinite beside a 0. NaN through.
        z = tl.where(x > 30.0, 30.0, tl.where(x < -30.0, -30.0, x))
        sigmoid, complement = sigmoid_both((z + 0.044715 * z * z * z) * SQRT_8_OVER_PI)
        inner = (1.0 + 0.134145 * z * z) * SQRT_8_OVER_PI
        value, slope = x * sigmoid, sigmoid + z * sigmoid * complement * inner
    elif ACTIVATION == "relu":
        value, slope = tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(x <= 0, 0.0, x)
        value, slope = positive * positive, 2.0 * positive
    return value, slope


@triton.jit
def unary_forward_kernel(
    x_ptr,
    y_ptr,
    rows,
    dim,
    x_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    value, _ = sloped(load(x_ptr + row * x_stride + col, mask), ACTIVATION)
    store(y_ptr + row * dim + col, value, mask)


@triton.jit
def unary_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    rows,
    dim,
    dy_stride,
    x_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    dy = load(dy_ptr + row * dy_stride + col, mask)
    _, slope = sloped(load(x_ptr + row * x_stride + col, mask), ACTIVATION)
    store(dx_ptr + row * dim + col, dy * slope, mask)


@triton.jit
def glu_forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    dim,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    value, _ = sloped(load(gate_ptr + row * gate_stride + col, mask), ACTIVATION)
    up = load(up_ptr + row * up_stride + col, mask)
    store(y_ptr + row * dim + col, value * up, mask)


@triton.jit
def glu_backward_kernel(
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
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row, col, mask = tile_indices(rows, dim, BLOCK_ROWS, BLOCK_DIM)
    dy = load(dy_ptr + row * dy_stride + col, mask)
    value, slope = sloped(load(gate_ptr + row * gate_stride + col, mask), ACTIVATION)
    up = load(up_ptr + row * up_stride + col, mask)
    store(dgate_ptr + row * dim + col, dy * up * slope, mask)
    store(dup_ptr + row * dim + col, dy * value, mask)


def unary(name: Callable[..., str]) -> tuple[Callable, Callable]:
    """`forward` and `backward` of y = f(x)."""

    def forward(x: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        y = contiguous_like(x) if out is None else out
        launch(unary_forward_kernel, (x,), (y,), name(*options))
        return y

    def backward(dy: Tensor, x: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        dx = contiguous_like(x) if out is None else out
        launch(unary_backward_kernel, (dy, x), (dx,), name(*options))
        return dx

    return forward, backward


def glu(name: Callable[..., str]) -> tuple[Callable, Callable]:
    """`forward` and `backward` of y = f(gate) · up."""

    def forward(gate: Tensor, up: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        y = contiguous_like(gate) if out is None else out
        launch(glu_forward_kernel, (gate, up), (y,), name(*options))
        return y

    def backward(
        dy: Tensor, gate: Tensor, up: Tensor, *options: object, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        dgate, dup = (contiguous_like(gate), contiguous_like(gate)) if out is None else out
        launch(glu_backward_kernel, (dy, gate, up), (dgate, dup), name(*options))
        return dgate, dup

    return forward, backward
