"""AdamW with 8-bit block-wise states in Triton: one launch for a whole list of tensors, whole blocks per program.

Codes become numbers and numbers codes by arithmetic, with csrc/dynamic_map.h's J and e: loads from a table would take
every code to another layout and back, through shared memory.
Source: Dettmers et al. 2021, arXiv:2110.02861; Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors, flat
from llmsys.ops._list_triton import TL_DTYPE, addresses_of, at, find_block, is_whole, load_grad, tables
from llmsys.ops._triton import device_of, load, store
from llmsys.ops.adamw.triton_kernels import moment_settings, update_moments
from llmsys.ops.adamw_8bit.dynamic_map import BLOCK, SIGNED_ZERO, boundaries

ROWS = 8  # blocks of the states in a program
FEW_ROWS = 2  # of them at a time where accesses are not of whole vectors
WARPS = 4  # 16 elements per thread of an NVIDIA warp; 8 of an AMD wavefront, which are 16 bytes of bfloat16


@triton.jit
def number(middle, FIRST: tl.constexpr):
    """10^(e-7) times what J's middle is of 0.1 to 1. `middle` is 2 J + 1, FIRST of what stands for 0."""
    bits = middle.to(tl.int32, bitcast=True)  # e is the low part of the biased exponent
    fraction = (bits & 0x007FFFFF | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    power = tl.where(bits & (1 << 23) != 0, 10.0, 1.0)
    power *= tl.where(bits & (2 << 23) != 0, 100.0, 1.0)
    power *= tl.where(bits & (4 << 23) != 0, 10000.0, 1.0)
    power = tl.where(bits & (8 << 23) != 0, 1e8, power)  # of e = 8 the first J only, which is 1
    return tl.where(middle == FIRST, 0.0, tl.minimum(power * (0.9e-7 * fraction + 0.1e-7), 1.0))


@triton.jit
def decode(codes_ptr, scale_ptr, mask, row_mask, ZERO: tl.constexpr):
    # Codes are multiplied and added to as floats, by fma: of the pairs of 16-bit integers that LLVM makes of integers,
    # or of a float sum, ptxas 12.8 leaves single ones without the addition.
    code = tl.load(codes_ptr, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scale_ptr, mask=row_mask, other=0.0)[:, None]
    if ZERO:
        signed = tl.fma(code, 4.0, -4.0 * ZERO)
        magnitude = number(tl.abs(signed) + 2.0, 2.0)
        return tl.where(signed < 0, -magnitude, magnitude) * scale
    else:
        return number(tl.fma(code, 2.0, 3.0), 3.0) * scale


@triton.jit
def place(y, STARTS: tl.constexpr):
    """J of the number nearest to y in [0, 1], and a fraction. e is found by halves; meanwhile y becomes the part of its
    decade, in (0.1, 1), and STARTS are moved with it."""
    upper = y >= STARTS[4]
    part = tl.where(upper, y, y * 1e4)
    second = part >= tl.where(upper, STARTS[6], STARTS[2] * 1e4)
    part = tl.where(second, part, part * 1e2)
    even_start = tl.where(second, STARTS[7], STARTS[5] * 1e2)
    odd = part >= tl.where(upper, even_start, tl.where(second, STARTS[3] * 1e4, STARTS[1] * 1e6))
    part = tl.where(odd, part, part * 10.0)
    size = tl.where(upper, 16.0, 1.0) * tl.where(second, 4.0, 1.0) * tl.where(odd, 2.0, 1.0)  # 2^e
    j = size * tl.minimum(part * (1 / 0.9) + 8 / 9, 1.9999998807907104)
    return tl.where(y >= STARTS[8], 256.0, j)


@triton.jit
def encode(codes_ptr, scale_ptr, values, mask, row_mask, STARTS: tl.constexpr, ZERO: tl.constexpr):
    # Magnitudes by their bits, in the same order: a maximum of floats may drop NaN.
    largest = tl.max(tl.where(mask, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), axis=1)
    finite = largest < 0x7F800000
    scale = tl.where(finite, tl.maximum(largest, 0x00800000), 0x7FC00000).to(tl.float32, bitcast=True)
    tl.store(scale_ptr, scale, mask=row_mask)
    y = tl.where(finite[:, None], values * tl.div_rn(1.0, scale)[:, None], 0.0)
    if ZERO:
        k = tl.floor(place(tl.abs(y), STARTS) * 0.5)
        codes = tl.maximum(ZERO + tl.where(y < 0, -k, k), 0.0)  # -1 has no code of its own, as 1 has
    else:
        codes = tl.maximum(place(y, STARTS), 1.0) - 1.0
    tl.store(codes_ptr, codes.to(tl.int32).to(tl.uint8), mask=mask)


@triton.jit
def step_rows(
    addresses,
    exp_avg_scale,
    exp_avg_sq_scale,
    start,
    numel,
    grad_scale_ptr,
    decay,
    moments,
    direction,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SIGNED_STARTS: tl.constexpr,
    UNSIGNED_STARTS: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    param, grad, exp_avg, exp_avg_sq, master = addresses
    toward_grad, beta2, one_minus_beta2, FROM_GRAD = moments
    step_size, eps = direction
    row = start // BLOCK + tl.arange(0, ROWS)
    offset = start + (tl.arange(0, ROWS) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    mask = tl.full((ROWS, BLOCK), True, tl.int1) if WHOLE else offset < numel
    row_mask = tl.full((ROWS,), True, tl.int1) if WHOLE else row * BLOCK < numel
    param_ptr = at(param, PARAM, offset, WHOLE)
    master_ptr = at(master, tl.float32, offset, WHOLE)
    exp_avg_ptr = at(exp_avg, tl.uint8, offset, WHOLE)
    exp_avg_sq_ptr = at(exp_avg_sq, tl.uint8, offset, WHOLE)
    exp_avg_scale_ptr = at(exp_avg_scale, tl.float32, row, False)
    exp_avg_sq_scale_ptr = at(exp_avg_sq_scale, tl.float32, row, False)

    g = load_grad(at(grad, GRAD, offset, WHOLE), mask, grad_scale_ptr, MAXIMIZE)
    m = decode(exp_avg_ptr, exp_avg_scale_ptr, mask, row_mask, ZERO)
    v = decode(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, mask, row_mask, 0)
    p = load(master_ptr, mask) if MASTER else load(param_ptr, mask)
    m, v = update_moments(g, m, v, toward_grad, beta2, one_minus_beta2, FROM_GRAD)
    p = p * decay - step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    if MASTER:
        store(master_ptr, p, mask)
    store(param_ptr, p, mask)
    encode(exp_avg_ptr, exp_avg_scale_ptr, m, mask, row_mask, SIGNED_STARTS, ZERO)
    encode(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, v, mask, row_mask, UNSIGNED_STARTS, 0)


@triton.jit
def adamw_8bit_kernel(
    table_ptr,
    num_tensors,
    grad_scale_ptr,
    decay,
    toward_grad,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    TENSORS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FROM_GRAD: tl.constexpr,
    SIGNED_STARTS: tl.constexpr,
    UNSIGNED_STARTS: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start = find_block(table_ptr, num_tensors, TENSORS, ROWS * BLOCK)
    column_ptr = table_ptr + tensor
    numel = tl.load(column_ptr + num_tensors)
    addresses = addresses_of(column_ptr, num_tensors, 2, MASTER)
    exp_avg_scale = tl.load(column_ptr + (7 if MASTER else 6) * num_tensors)
    exp_avg_sq_scale = tl.load(column_ptr + (8 if MASTER else 7) * num_tensors)
    moments = (toward_grad, beta2, one_minus_beta2, FROM_GRAD)
    direction = (step_size, eps)
    if is_whole(addresses, start, numel, ROWS * BLOCK):
        step_rows(
            addresses, exp_avg_scale, exp_avg_sq_scale, start, numel, grad_scale_ptr, decay, moments, direction,
            PARAM, GRAD, MASTER, MAXIMIZE, SIGNED_STARTS, UNSIGNED_STARTS, ZERO, ROWS, BLOCK, True,
        )  # fmt: skip
    else:  # few rows at a time: there is one address per element
        for first in range(0, ROWS, FEW_ROWS):
            step_rows(
                addresses, exp_avg_scale, exp_avg_sq_scale, start + first * BLOCK, numel, grad_scale_ptr, decay,
                moments, direction,
                PARAM, GRAD, MASTER, MAXIMIZE, SIGNED_STARTS, UNSIGNED_STARTS, ZERO, FEW_ROWS, BLOCK, False,
            )  # fmt: skip


@cache
def starts(signed: bool) -> tuple[float, ...]:
    """From where on the nearest number is one of decade e, e = 0 ... 8."""
    halfway = boundaries(signed)[SIGNED_ZERO if signed else 0 :].float().tolist()
    before = [2 ** (e - 1) if signed else 2**e - 1 for e in range(1, 9)]  # numbers from 0 on, before those of e
    return (0.0, *(halfway[count - 1] for count in before))


@torch.no_grad()
def forward(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_scales: Tensors,
    exp_avg_sq_scales: Tensors,
    masters: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None,
    maximize: bool,
) -> None:
    moments, from_grad = moment_settings(beta1, beta2)
    # The square root of 1 - beta2^step taken out of the denominator: one division an element instead of two.
    correction2 = math.sqrt(1 - beta2**step)
    scalars = 1 - lr * weight_decay, *moments, lr / (1 - beta1**step) * correction2, eps * correction2
    dtypes = TL_DTYPE[params[0].dtype], TL_DTYPE[grads[0].dtype]
    # The codes are contiguous: laid out like them is in row-major order, as blocks are.
    with flat([params, exp_avgs, exp_avg_sqs, masters], [grads]) as (ps, ms, vs, ws, gs), device_of(params[0]):
        lists = [ps, gs, ms, vs, *[ws] * bool(ws), exp_avg_scales, exp_avg_sq_scales]
        for table, programs, total in tables(lists, block=ROWS * BLOCK):
            tensors = len(programs)
            adamw_8bit_kernel[(total,)](
                table, tensors, grad_scale, *scalars,
                *dtypes, bool(masters), triton.next_power_of_2(tensors), maximize, from_grad,
                starts(True), starts(False), SIGNED_ZERO, ROWS, FEW_ROWS, BLOCK, num_warps=WARPS,
            )  # fmt: skip
