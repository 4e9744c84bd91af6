"""AdamW in Triton: one launch for a whole list of tensors, whose addresses the kernel reads from a table.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, in the form torch.optim.AdamW computes it.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors, flat
from llmsys.ops._stochastic import first_elements
from llmsys.ops._triton import device_of, load, seed_words, store, store_stochastic

BLOCK = 2048
WARPS = 8  # 8 elements per thread: a block on the unvectorised path holds one address per element
MAX_TENSORS = 1024  # per launch: every program reads one number of each to find its tensor


@triton.jit
def update(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    mask,
    seed_low,
    seed_high,
    first,
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
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    grad = load(grad_ptr, mask)
    if grad_scale_ptr is not None:
        grad *= tl.load(grad_scale_ptr)
    if MAXIMIZE:
        grad = -grad
    m = load(exp_avg_ptr, mask)
    v = load(exp_avg_sq_ptr, mask)
    if MASTER:
        p = load(master_ptr, mask)
    else:
        p = load(param_ptr, mask)
    p *= decay
    m = (grad if FROM_GRAD else m) + (grad - m) * toward_grad  # torch.lerp's two forms
    v = v * beta2 + grad * one_minus_beta2 * grad
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), sqrt_bias_correction2) + eps)
    store(exp_avg_ptr, m, mask)
    store(exp_avg_sq_ptr, v, mask)
    if MASTER:
        store(master_ptr, p, mask)
    if STOCHASTIC:
        store_stochastic(param_ptr, p, seed_low, seed_high, first, mask, BLOCK)
    else:
        store(param_ptr, p, mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def adamw_kernel(
    table_ptr,
    grad_scale_ptr,
    num_tensors,
    seed_low,
    seed_high,
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
    STOCHASTIC: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block of one tensor. `table` is (columns, num_tensors): first program, numel, then addresses."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TENSORS)
    first_programs = tl.load(table_ptr + index, mask=index < num_tensors, other=1 << 62)
    tensor = tl.sum((first_programs <= program).to(tl.int32), axis=0) - 1
    column_ptr = table_ptr + tensor
    start = (program - tl.load(column_ptr)) * BLOCK
    numel = tl.load(column_ptr + num_tensors)
    param = tl.load(column_ptr + 2 * num_tensors)
    grad = tl.load(column_ptr + 3 * num_tensors)
    exp_avg = tl.load(column_ptr + 4 * num_tensors)
    exp_avg_sq = tl.load(column_ptr + 5 * num_tensors)
    master = exp_avg
    if MASTER:
        master = tl.load(column_ptr + 6 * num_tensors)
    first = start
    if STOCHASTIC:  # in the place of a master, as there is none
        first += tl.load(column_ptr + 6 * num_tensors)

    param_ptr = param.to(tl.pointer_type(PARAM))
    grad_ptr = grad.to(tl.pointer_type(GRAD))
    exp_avg_ptr = exp_avg.to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = exp_avg_sq.to(tl.pointer_type(tl.float32))
    master_ptr = master.to(tl.pointer_type(tl.float32))
    offset = start + tl.arange(0, BLOCK)
    # A full block at addresses that are multiples of 16 bytes takes vector loads, which the compiler must be promised.
    if (start + BLOCK <= numel) & ((param | grad | exp_avg | exp_avg_sq | master) % 16 == 0):
        update(
            tl.multiple_of(param_ptr, 16) + offset,
            tl.multiple_of(grad_ptr, 16) + offset,
            tl.multiple_of(exp_avg_ptr, 16) + offset,
            tl.multiple_of(exp_avg_sq_ptr, 16) + offset,
            tl.multiple_of(master_ptr, 16) + offset,
            tl.full((BLOCK,), True, tl.int1),
            seed_low,
            seed_high,
            first,
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
            STOCHASTIC,
            BLOCK,
        )
    else:
        update(
            param_ptr + offset,
            grad_ptr + offset,
            exp_avg_ptr + offset,
            exp_avg_sq_ptr + offset,
            master_ptr + offset,
            offset < numel,
            seed_low,
            seed_high,
            first,
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
            STOCHASTIC,
            BLOCK,
        )


def address_table(columns: list[Tensors]) -> tuple[list[list[int]], int]:
    """The kernel's table, and the number of programs."""
    numels = [x.numel() for x in columns[0]]
    ends = list(accumulate(triton.cdiv(numel, BLOCK) for numel in numels))
    return [[0, *ends[:-1]], numels, *([x.data_ptr() for x in column] for column in columns)], ends[-1]


TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@torch.no_grad()
def forward(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None,
    maximize: bool,
    stochastic_rounding: int | None,
) -> None:
    from_grad = beta1 <= 0.5
    toward_grad = -beta1 if from_grad else 1 - beta1
    step_size = lr / (1 - beta1**step)
    scalars = 1 - lr * weight_decay, toward_grad, beta2, 1 - beta2, step_size, math.sqrt(1 - beta2**step), eps
    stochastic, firsts = stochastic_rounding is not None, first_elements(params)
    seeds = (0, 0) if stochastic_rounding is None else seed_words(stochastic_rounding)
    with (
        flat([params, exp_avgs, exp_avg_sqs, masters], [grads], row_major=stochastic) as (ps, ms, vs, ws, gs),
        device_of(params[0]),
    ):
        lists = [ps, gs, ms, vs] + ([ws] if masters else [])
        for begin in range(0, len(params), MAX_TENSORS):
            columns = [tensors[begin : begin + MAX_TENSORS] for tensors in lists]
            rows, programs = address_table(columns)
            if programs == 0:
                continue
            if stochastic:
                rows.append(firsts[begin : begin + MAX_TENSORS])
            table = torch.tensor(rows, dtype=torch.int64)
            if params[0].is_cuda:  # pinned, so that the copy does not wait for the device
                table = table.pin_memory().to(params[0].device, non_blocking=True)
            adamw_kernel[(programs,)](
                table, grad_scale, len(columns[0]), *seeds, *scalars,
                TL_DTYPE[params[0].dtype], TL_DTYPE[grads[0].dtype], bool(masters), maximize, from_grad, stochastic,
                triton.next_power_of_2(len(columns[0])), BLOCK, num_warps=WARPS,
            )  # fmt: skip
