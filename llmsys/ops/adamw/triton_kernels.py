"""AdamW in Triton: one launch for a whole list of tensors, whose addresses the kernel reads from a table.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, in the form torch.optim.AdamW computes it.
"""

import math
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._triton import device_of, load, num_warps, store

BLOCK = 4096
MAX_TENSORS = 1024  # per launch: every program reads one number of each to find its tensor
ALIGNMENT = 16  # bytes, of a vector load


@triton.jit
def table_pointer(table_ptr, column, tensor, stride, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column * stride + tensor).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adamw_kernel(
    table_ptr,
    grad_scale_ptr,
    num_tensors,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    sqrt_bias_correction2,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TENSORS)
    first_programs = tl.load(table_ptr + index, mask=index < num_tensors, other=1 << 62)
    tensor = tl.sum((first_programs <= program).to(tl.int32), axis=0) - 1
    start = (program - tl.load(table_ptr + tensor)) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    mask = offset < tl.load(table_ptr + num_tensors + tensor)

    param_ptr = table_pointer(table_ptr, 2, tensor, num_tensors, PARAM, ALIGNED) + offset
    grad_ptr = table_pointer(table_ptr, 3, tensor, num_tensors, GRAD, ALIGNED) + offset
    exp_avg_ptr = table_pointer(table_ptr, 4, tensor, num_tensors, tl.float32, ALIGNED) + offset
    exp_avg_sq_ptr = table_pointer(table_ptr, 5, tensor, num_tensors, tl.float32, ALIGNED) + offset
    grad = load(grad_ptr, mask)
    if grad_scale_ptr is not None:
        grad *= tl.load(grad_scale_ptr)
    if MAXIMIZE:
        grad = -grad
    m = tl.load(exp_avg_ptr, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr, mask=mask, other=0.0)
    if MASTER:
        master_ptr = table_pointer(table_ptr, 6, tensor, num_tensors, tl.float32, ALIGNED) + offset
        p = tl.load(master_ptr, mask=mask, other=0.0)
    else:
        p = load(param_ptr, mask)

    p *= decay
    m += (grad - m) * one_minus_beta1
    v = v * beta2 + grad * grad * one_minus_beta2
    denominator = tl.div_rn(tl.sqrt_rn(v), sqrt_bias_correction2) + eps
    p -= step_size * tl.div_rn(m, denominator)

    tl.store(exp_avg_ptr, m, mask=mask)
    tl.store(exp_avg_sq_ptr, v, mask=mask)
    if MASTER:
        tl.store(master_ptr, p, mask=mask)
    store(param_ptr, p, mask)


def address_table(columns: list[list[Tensor]]) -> tuple[list[list[int]], int, bool]:
    """The kernel's table by rows (first program, numel, one address per column), programs, whether all is aligned."""
    numels = [x.numel() for x in columns[0]]
    ends = list(accumulate(triton.cdiv(numel, BLOCK) for numel in numels))
    addresses = [[x.data_ptr() for x in column] for column in columns]
    aligned = all(address % ALIGNMENT == 0 for column in addresses for address in column)
    return [[0, *ends[:-1]], numels, *addresses], ends[-1], aligned


TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None,
    maximize: bool,
) -> None:
    step_size = lr / (1 - beta1**step)
    scalars = 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, step_size, math.sqrt(1 - beta2**step), eps
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([masters] if masters else [])
    for begin in range(0, len(params), MAX_TENSORS):
        columns = [tensors[begin : begin + MAX_TENSORS] for tensors in lists]
        rows, programs, aligned = address_table(columns)
        if programs == 0:
            continue
        table = torch.tensor(rows, dtype=torch.int64)
        if params[0].is_cuda:  # pinned, so that the copy does not wait for the device
            table = table.pin_memory().to(params[0].device, non_blocking=True)
        with device_of(params[0]):
            adamw_kernel[(programs,)](
                table, grad_scale, len(columns[0]), *scalars,
                TL_DTYPE[params[0].dtype], TL_DTYPE[grads[0].dtype], bool(masters), maximize, aligned,
                triton.next_power_of_2(len(columns[0])), BLOCK, num_warps=num_warps(BLOCK),
            )  # fmt: skip
