"""LAMB in Triton, in three launches for a whole list of tensors: moments, with the sums of squares of each block; each
tensor's step; the weights.

Source: You et al. 2019, arXiv:1904.00962, algorithm 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors
from llmsys.ops._list_triton import (
    BLOCK,
    WARPS,
    addresses_of,
    find_block,
    is_whole,
    load_grad,
    pointers_of,
    step_block,
    step_launches,
)
from llmsys.ops._triton import load, num_warps, store
from llmsys.ops.adamw.triton_kernels import adam_direction, moment_settings, update_moments

PARTS = 1024  # blocks whose sums are added in one go


@triton.jit
def first_part(table_ptr, tensor):
    """Where the sums of a tensor's blocks begin: at a multiple of 4, so that they are read 16 bytes at a time and in an
    order that does not depend on the tensors before."""
    return (tl.load(table_ptr + tensor) + 3 * tensor) // 4 * 4


@triton.jit
def direction(p, m, v, settings):
    step_size, sqrt_bias_correction2, eps, weight_decay = settings
    return adam_direction(m, v, step_size, sqrt_bias_correction2, eps) + weight_decay * p


@triton.jit
def update_block_moments(
    addresses,
    start,
    numel,
    grad_scale_ptr,
    moments,
    settings,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The sums of squares of the block's weights and of its direction."""
    pointers = pointers_of(addresses, start, numel, PARAM, GRAD, BLOCK, WHOLE)
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, mask = pointers
    toward_grad, beta2, one_minus_beta2, FROM_GRAD = moments
    g = load_grad(grad_ptr, mask, grad_scale_ptr, MAXIMIZE)
    m, v = load(exp_avg_ptr, mask), load(exp_avg_sq_ptr, mask)
    m, v = update_moments(g, m, v, toward_grad, beta2, one_minus_beta2, FROM_GRAD)
    store(exp_avg_ptr, m, mask)
    store(exp_avg_sq_ptr, v, mask)
    p = load(master_ptr, mask) if MASTER else load(param_ptr, mask)
    u = tl.where(mask, direction(p, m, v, settings), 0.0)  # 0 / 0 outside where eps is 0
    return tl.sum(p * p, axis=0), tl.sum(u * u, axis=0)


@triton.jit
def moments_kernel(
    table_ptr,
    num_tensors,
    grad_scale_ptr,
    weights_parts_ptr,
    direction_parts_ptr,
    toward_grad,
    beta2,
    one_minus_beta2,
    step_size,
    sqrt_bias_correction2,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    TENSORS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FROM_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start = find_block(table_ptr, num_tensors, TENSORS, BLOCK)
    numel = tl.load(table_ptr + num_tensors + tensor)
    addresses = addresses_of(table_ptr + tensor, num_tensors, 2, MASTER)
    moments = (toward_grad, beta2, one_minus_beta2, FROM_GRAD)
    settings = (step_size, sqrt_bias_correction2, eps, weight_decay)
    if is_whole(addresses, start, numel, BLOCK):
        weights, directions = update_block_moments(
            addresses, start, numel, grad_scale_ptr, moments, settings, PARAM, GRAD, MASTER, MAXIMIZE, BLOCK, True
        )
    else:
        weights, directions = update_block_moments(
            addresses, start, numel, grad_scale_ptr, moments, settings, PARAM, GRAD, MASTER, MAXIMIZE, BLOCK, False
        )
    part = first_part(table_ptr, tensor) + start // BLOCK
    tl.store(weights_parts_ptr + part, weights)
    tl.store(direction_parts_ptr + part, directions)


@triton.jit
def steps_kernel(
    table_ptr,
    num_tensors,
    weights_parts_ptr,
    direction_parts_ptr,
    steps_ptr,
    lr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """lr · ‖p‖ / ‖u‖ of each tensor. Its parts are read beyond their end, where memory is but nothing that counts."""
    tensor = tl.program_id(0)
    parts = tl.cdiv(tl.load(table_ptr + num_tensors + tensor), BLOCK)
    first = first_part(table_ptr, tensor)
    weights = tl.zeros((PARTS,), tl.float64)
    directions = tl.zeros((PARTS,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        weights += tl.where(part < parts, tl.load(weights_parts_ptr + first + part), 0.0).to(tl.float64)
        directions += tl.where(part < parts, tl.load(direction_parts_ptr + first + part), 0.0).to(tl.float64)
    weights_sum, direction_sum = tl.sum(weights, axis=0), tl.sum(directions, axis=0)
    ratio = tl.sqrt(weights_sum) / tl.sqrt(direction_sum)
    ratio = tl.where((weights_sum == 0) | (direction_sum == 0), 1.0, ratio)
    tl.store(steps_ptr + tensor, (lr * ratio).to(tl.float32))


@triton.jit
def lamb_step(p, g, m, v, settings):
    step, direction_settings = settings
    return p - step * direction(p, m, v, direction_settings), m, v


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def lamb_kernel(
    table_ptr,
    num_tensors,
    seed_low,
    seed_high,
    steps_ptr,
    step_size,
    sqrt_bias_correction2,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start = find_block(table_ptr, num_tensors, TENSORS, BLOCK)
    settings = (tl.load(steps_ptr + tensor), (step_size, sqrt_bias_correction2, eps, weight_decay))
    step_block(
        lamb_step, settings, tensor, start, table_ptr, num_tensors, seed_low, seed_high, None,
        PARAM, GRAD, 2, MASTER, STOCHASTIC, False, BLOCK, True,
    )  # fmt: skip


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
    moments, from_grad = moment_settings(beta1, beta2)
    settings = 1 / (1 - beta1**step), math.sqrt(1 - beta2**step), eps, weight_decay
    states = [exp_avgs, exp_avg_sqs]
    for programs, arguments, constants in step_launches(
        params, grads, states, masters, stochastic_rounding, row_major=True
    ):
        table, tensors, *_ = arguments
        param, grad, master, _, padded_tensors = constants
        size = programs + 4 * tensors + PARTS
        parts = [torch.empty(size, dtype=torch.float32, device=table.device) for _ in range(2)]
        steps = torch.empty(tensors, dtype=torch.float32, device=table.device)
        moments_kernel[(programs,)](
            table, tensors, grad_scale, *parts, *moments, *settings,
            param, grad, master, padded_tensors, maximize, from_grad, BLOCK, num_warps=WARPS,
        )  # fmt: skip
        steps_kernel[(tensors,)](table, tensors, *parts, steps, lr, BLOCK, PARTS, num_warps=num_warps(PARTS))
        lamb_kernel[(programs,)](*arguments, steps, *settings, *constants, BLOCK, num_warps=WARPS)
