"""Stochastic gradient descent in Triton: one launch for a list of tensors, from a table of addresses.

Source: Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13, in the form torch.optim.SGD computes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors, flat
from llmsys.ops._triton import device_of, load, store
from llmsys.ops.adamw.triton_kernels import BLOCK, MAX_TENSORS, TL_DTYPE, WARPS, address_table


@triton.jit
def update(
    param_ptr,
    grad_ptr,
    state_ptr,
    master_ptr,
    mask,
    grad_scale_ptr,
    lr,
    momentum,
    toward_grad,
    weight_decay,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STATE: tl.constexpr,
    NESTEROV: tl.constexpr,
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
    grad = tl.where(weight_decay != 0, grad + weight_decay * p, grad)
    if STATE:
        buffer = load(state_ptr, mask) * momentum + grad * toward_grad
        store(state_ptr, buffer, mask)
        if NESTEROV:
            grad += momentum * buffer
        else:
            grad = buffer
    p -= lr * grad
    if MASTER:
        store(master_ptr, p, mask)
    store(param_ptr, p, mask)


@triton.jit
def sgd_kernel(
    table_ptr,
    grad_scale_ptr,
    num_tensors,
    lr,
    momentum,
    toward_grad,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STATE: tl.constexpr,
    NESTEROV: tl.constexpr,
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
            grad_scale_ptr,
            lr,
            momentum,
            toward_grad,
            weight_decay,
            MASTER,
            MAXIMIZE,
            STATE,
            NESTEROV,
        )
    else:
        update(
            param_ptr + offset,
            grad_ptr + offset,
            state_ptr + offset,
            master_ptr + offset,
            offset < numel,
            grad_scale_ptr,
            lr,
            momentum,
            toward_grad,
            weight_decay,
            MASTER,
            MAXIMIZE,
            STATE,
            NESTEROV,
        )


@torch.no_grad()
def forward(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    masters: Tensors,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    step: int,
    grad_scale: torch.Tensor | None,
    maximize: bool,
) -> None:
    scalars = lr, momentum, 1.0 - dampening if step > 1 else 1.0, weight_decay
    with flat([params, momentum_buffers, masters], [grads]) as (ps, ss, ws, gs), device_of(params[0]):
        lists = [tensors for tensors in (ps, gs, ss, ws) if tensors]
        for begin in range(0, len(params), MAX_TENSORS):
            columns = [tensors[begin : begin + MAX_TENSORS] for tensors in lists]
            rows, programs = address_table(columns)
            if programs == 0:
                continue
            table = torch.tensor(rows, dtype=torch.int64)
            if params[0].is_cuda:  # pinned, so that the copy does not wait for the device
                table = table.pin_memory().to(params[0].device, non_blocking=True)
            sgd_kernel[(programs,)](
                table, grad_scale, len(columns[0]), *scalars,
                TL_DTYPE[params[0].dtype], TL_DTYPE[grads[0].dtype], bool(masters), maximize,
                bool(momentum_buffers), nesterov,
                triton.next_power_of_2(len(columns[0])), BLOCK, num_warps=WARPS,
            )  # fmt: skip
