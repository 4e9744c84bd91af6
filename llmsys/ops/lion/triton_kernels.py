"""Lion in Triton: one launch for a whole list of tensors, whose addresses the kernel reads from a table.

Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors, flat
from llmsys.ops._stochastic import first_elements
from llmsys.ops._triton import device_of, load, seed_words, store, store_stochastic
from llmsys.ops.adamw.triton_kernels import BLOCK, MAX_TENSORS, TL_DTYPE, WARPS, address_table


@triton.jit
def update(
    param_ptr,
    grad_ptr,
    state_ptr,
    master_ptr,
    mask,
    seed_low,
    seed_high,
    first,
    grad_scale_ptr,
    lr,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    grad = load(grad_ptr, mask)
    if grad_scale_ptr is not None:
        grad *= tl.load(grad_scale_ptr)
    if MAXIMIZE:
        grad = -grad
    if MASTER:
        p = load(master_ptr, mask)
    else:
        p = load(param_ptr, mask)
    m = load(state_ptr, mask)
    c = m * beta1 + grad * one_minus_beta1
    # Neither above nor below 0 is 0, or NaN: then p becomes NaN too.
    p = p * decay - tl.where(c > 0, lr, tl.where(c < 0, -lr, c))
    store(state_ptr, m * beta2 + grad * one_minus_beta2, mask)
    if MASTER:
        store(master_ptr, p, mask)
    if STOCHASTIC:
        store_stochastic(param_ptr, p, seed_low, seed_high, first, mask, BLOCK)
    else:
        store(param_ptr, p, mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def lion_kernel(
    table_ptr,
    grad_scale_ptr,
    num_tensors,
    seed_low,
    seed_high,
    lr,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STATE: tl.constexpr,
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
    state = param
    if STATE:
        state = tl.load(column_ptr + 4 * num_tensors)
    master = param
    if MASTER:
        master = tl.load(column_ptr + (4 + STATE) * num_tensors)
    first = start
    if STOCHASTIC:  # in the place of a master, as there is none
        first += tl.load(column_ptr + (4 + STATE) * num_tensors)
    param_ptr = param.to(tl.pointer_type(PARAM))
    grad_ptr = grad.to(tl.pointer_type(GRAD))
    state_ptr = state.to(tl.pointer_type(tl.float32))
    master_ptr = master.to(tl.pointer_type(tl.float32))
    offset = start + tl.arange(0, BLOCK)
    # A full block at addresses that are multiples of 16 bytes takes vector loads, which the compiler must be promised.
    if (start + BLOCK <= numel) & ((param | grad | state | master) % 16 == 0):
        update(
            tl.multiple_of(param_ptr, 16) + offset,
            tl.multiple_of(grad_ptr, 16) + offset,
            tl.multiple_of(state_ptr, 16) + offset,
            tl.multiple_of(master_ptr, 16) + offset,
            tl.full((BLOCK,), True, tl.int1),
            seed_low,
            seed_high,
            first,
            grad_scale_ptr,
            lr,
            decay,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            MASTER,
            MAXIMIZE,
            STATE,
            STOCHASTIC,
            BLOCK,
        )
    else:
        update(
            param_ptr + offset,
            grad_ptr + offset,
            state_ptr + offset,
            master_ptr + offset,
            offset < numel,
            seed_low,
            seed_high,
            first,
            grad_scale_ptr,
            lr,
            decay,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            MASTER,
            MAXIMIZE,
            STATE,
            STOCHASTIC,
            BLOCK,
        )


@torch.no_grad()
def forward(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    masters: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None,
    maximize: bool,
    stochastic_rounding: int | None,
) -> None:
    scalars = lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2
    stochastic, firsts = stochastic_rounding is not None, first_elements(params)
    seeds = (0, 0) if stochastic_rounding is None else seed_words(stochastic_rounding)
    with flat([params, exp_avgs, masters], [grads], row_major=stochastic) as (ps, ss, ws, gs), device_of(params[0]):
        lists = [tensors for tensors in (ps, gs, ss, ws) if tensors]
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
            lion_kernel[(programs,)](
                table, grad_scale, len(columns[0]), *seeds, *scalars,
                TL_DTYPE[params[0].dtype], TL_DTYPE[grads[0].dtype], bool(masters), maximize, True, stochastic,
                triton.next_power_of_2(len(columns[0])), BLOCK, num_warps=WARPS,
            )  # fmt: skip
