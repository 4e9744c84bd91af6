"""AdamW with 8-bit block-wise states in Triton: one launch for a whole list, a tile of whole blocks per program.

Codes become numbers by a load from the map, numbers become codes by eight steps of a binary search of the boundaries
between them: both tables stay in the caches.
Source: Dettmers et al. 2021, arXiv:2110.02861; Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors, flat
from llmsys.ops._triton import device_of, load, store
from llmsys.ops.adamw.triton_kernels import MAX_TENSORS, TL_DTYPE
from llmsys.ops.adamw_8bit.dynamic_map import BLOCK, SIGNED_ZERO, boundaries, numbers

ROWS = 4  # blocks a program
WARPS = 4  # 8 elements per thread


@triton.jit
def decode(codes_ptr, scales, mask, map_ptr):
    codes = tl.load(codes_ptr, mask=mask, other=0).to(tl.int32)
    return tl.load(map_ptr + codes) * scales[:, None]


@triton.jit
def encode(codes_ptr, scales_ptr, values, mask, row_mask, boundaries_ptr, ZERO: tl.constexpr):
    # Magnitudes as integers, in the same order: a maximum of floats may drop NaN.
    largest = tl.max(tl.where(mask, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), axis=1)
    finite = largest < 0x7F800000
    scales = tl.where(finite, tl.maximum(largest, 0x00800000), 0x7FC00000).to(tl.float32, bitcast=True)
    tl.store(scales_ptr, scales, mask=row_mask)
    ratios = tl.div_rn(values, tl.broadcast_to(scales[:, None], values.shape))
    codes = tl.zeros(values.shape, tl.int32)
    for i in tl.static_range(8):
        middle = codes + (128 >> i)
        codes = tl.where(ratios >= tl.load(boundaries_ptr + middle - 1), middle, codes)
    tl.store(codes_ptr, tl.where(finite[:, None], codes, ZERO).to(tl.uint8), mask=mask)


@triton.jit
def update(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_scale_ptr,
    master_ptr,
    mask,
    row_mask,
    signed_ptr,
    unsigned_ptr,
    grad_scale_ptr,
    decay,
    toward_grad,
    beta2,
    one_minus_beta2,
    step_size,
    sqrt_bias_correction2,
    eps,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FROM_GRAD: tl.constexpr,
    ZERO: tl.constexpr,
):
    grad = load(grad_ptr, mask)
    if grad_scale_ptr is not None:
        grad *= tl.load(grad_scale_ptr)
    if MAXIMIZE:
        grad = -grad
    m = decode(exp_avg_ptr, tl.load(exp_avg_scale_ptr, mask=row_mask, other=0.0), mask, signed_ptr)
    v = decode(exp_avg_sq_ptr, tl.load(exp_avg_sq_scale_ptr, mask=row_mask, other=0.0), mask, unsigned_ptr)
    if MASTER:
        p = load(master_ptr, mask)
    else:
        p = load(param_ptr, mask)
    p *= decay
    m = (grad if FROM_GRAD else m) + (grad - m) * toward_grad  # torch.lerp's two forms
    v = v * beta2 + grad * one_minus_beta2 * grad
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), sqrt_bias_correction2) + eps)
    if MASTER:
        store(master_ptr, p, mask)
    store(param_ptr, p, mask)
    encode(exp_avg_ptr, exp_avg_scale_ptr, m, mask, row_mask, signed_ptr + 256, ZERO)
    encode(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, v, mask, row_mask, unsigned_ptr + 256, 0)


@triton.jit
def adamw_8bit_kernel(
    table_ptr,
    signed_ptr,
    unsigned_ptr,
    grad_scale_ptr,
    num_tensors,
    decay,
    toward_grad,
    beta2,
    one_minus_beta2,
    step_size,
    sqrt_bias_correction2,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FROM_GRAD: tl.constexpr,
    TENSORS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Update ROWS blocks of one tensor. `table` is (columns, num_tensors): first program, numel, then addresses; each
    map is its 256 numbers, then the 255 boundaries between them."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TENSORS)
    first_programs = tl.load(table_ptr + index, mask=index < num_tensors, other=1 << 62)
    tensor = tl.sum((first_programs <= program).to(tl.int32), axis=0) - 1
    column_ptr = table_ptr + tensor
    numel = tl.load(column_ptr + num_tensors)
    param = tl.load(column_ptr + 2 * num_tensors)
    grad = tl.load(column_ptr + 3 * num_tensors)
    exp_avg = tl.load(column_ptr + 4 * num_tensors)
    exp_avg_sq = tl.load(column_ptr + 5 * num_tensors)
    master = param
    if MASTER:
        master = tl.load(column_ptr + 8 * num_tensors)
    param_ptr = param.to(tl.pointer_type(PARAM))
    grad_ptr = grad.to(tl.pointer_type(GRAD))
    exp_avg_ptr = exp_avg.to(tl.pointer_type(tl.uint8))
    exp_avg_sq_ptr = exp_avg_sq.to(tl.pointer_type(tl.uint8))
    master_ptr = master.to(tl.pointer_type(tl.float32))

    first_row = (program - tl.load(column_ptr)) * ROWS
    row = first_row + tl.arange(0, ROWS)
    exp_avg_scale_ptr = tl.load(column_ptr + 6 * num_tensors).to(tl.pointer_type(tl.float32)) + row
    exp_avg_sq_scale_ptr = tl.load(column_ptr + 7 * num_tensors).to(tl.pointer_type(tl.float32)) + row
    offset = first_row * BLOCK + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # A full tile at addresses that are multiples of 16 bytes takes vector loads, which the compiler must be promised.
    if ((first_row + ROWS) * BLOCK <= numel) & ((param | grad | exp_avg | exp_avg_sq | master) % 16 == 0):
        update(
            tl.multiple_of(param_ptr, 16) + offset,
            tl.multiple_of(grad_ptr, 16) + offset,
            tl.multiple_of(exp_avg_ptr, 16) + offset,
            tl.multiple_of(exp_avg_sq_ptr, 16) + offset,
            exp_avg_scale_ptr,
            exp_avg_sq_scale_ptr,
            tl.multiple_of(master_ptr, 16) + offset,
            tl.full((ROWS, BLOCK), True, tl.int1),
            tl.full((ROWS,), True, tl.int1),
            signed_ptr,
            unsigned_ptr,
            grad_scale_ptr,
            decay,
            toward_grad,
            beta2,
            one_minus_beta2,
            step_size,
            sqrt_bias_correction2,
            eps,
            MASTER,
            MAXIMIZE,
            FROM_GRAD,
            ZERO,
        )
    else:
        update(
            param_ptr + offset,
            grad_ptr + offset,
            exp_avg_ptr + offset,
            exp_avg_sq_ptr + offset,
            exp_avg_scale_ptr,
            exp_avg_sq_scale_ptr,
            master_ptr + offset,
            offset < numel,
            row * BLOCK < numel,
            signed_ptr,
            unsigned_ptr,
            grad_scale_ptr,
            decay,
            toward_grad,
            beta2,
            one_minus_beta2,
            step_size,
            sqrt_bias_correction2,
            eps,
            MASTER,
            MAXIMIZE,
            FROM_GRAD,
            ZERO,
        )


@cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The signed and the unsigned map, each followed by its boundaries."""
    signed, unsigned = (torch.cat([numbers(signed), boundaries(signed).float()]) for signed in (True, False))
    return signed.to(device), unsigned.to(device)


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
    from_grad = beta1 <= 0.5
    toward_grad = -beta1 if from_grad else 1 - beta1
    step_size = lr / (1 - beta1**step)
    scalars = 1 - lr * weight_decay, toward_grad, beta2, 1 - beta2, step_size, math.sqrt(1 - beta2**step), eps
    signed, unsigned = tables(params[0].device)
    # The codes are contiguous: laid out like them is in row-major order, as blocks are.
    with flat([params, exp_avgs, exp_avg_sqs, masters], [grads]) as (ps, ms, vs, ws, gs), device_of(params[0]):
        lists = [ps, gs, ms, vs, exp_avg_scales, exp_avg_sq_scales] + ([ws] if masters else [])
        for begin in range(0, len(params), MAX_TENSORS):
            columns = [tensors[begin : begin + MAX_TENSORS] for tensors in lists]
            numels = [x.numel() for x in columns[0]]
            ends = list(accumulate(triton.cdiv(numel, ROWS * BLOCK) for numel in numels))
            if ends[-1] == 0:
                continue
            rows = [[0, *ends[:-1]], numels, *([x.data_ptr() for x in column] for column in columns)]
            table = torch.tensor(rows, dtype=torch.int64)
            if params[0].is_cuda:  # pinned, so that the copy does not wait for the device
                table = table.pin_memory().to(params[0].device, non_blocking=True)
            adamw_8bit_kernel[(ends[-1],)](
                table, signed, unsigned, grad_scale, len(columns[0]), *scalars,
                TL_DTYPE[params[0].dtype], TL_DTYPE[grads[0].dtype], bool(masters), maximize, from_grad,
                triton.next_power_of_2(len(columns[0])), ROWS, BLOCK, SIGNED_ZERO, num_warps=WARPS,
            )  # fmt: skip
