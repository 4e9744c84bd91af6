"""Stochastic gradient descent in Triton: one launch for a whole list of tensors.

Source: Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13, in the form torch.optim.SGD computes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors
from llmsys.ops._list_triton import BLOCK, WARPS, find_block, step_block, step_launches


@triton.jit
def sgd_step(p, g, buffer, nothing, settings):
    lr, momentum, toward_grad, weight_decay, DECAY, MOMENTUM, NESTEROV = settings
    if DECAY:
        g += weight_decay * p
    if MOMENTUM:
        buffer = buffer * momentum + g * toward_grad
        g = g + momentum * buffer if NESTEROV else buffer
    return p - lr * g, buffer, nothing


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def sgd_kernel(
    table_ptr,
    num_tensors,
    seed_low,
    seed_high,
    grad_scale_ptr,
    lr,
    momentum,
    toward_grad,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TENSORS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start = find_block(table_ptr, num_tensors, TENSORS, BLOCK)
    step_block(
        sgd_step,
        (lr, momentum, toward_grad, weight_decay, DECAY, MOMENTUM, NESTEROV),
        tensor, start, table_ptr, num_tensors, seed_low, seed_high, grad_scale_ptr,
        PARAM, GRAD, 1 if MOMENTUM else 0, MASTER, STOCHASTIC, MAXIMIZE, BLOCK,
    )  # fmt: skip


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
    stochastic_rounding: int | None,
) -> None:
    scalars = lr, momentum, 1 - dampening if step > 1 else 1.0, weight_decay
    options = maximize, weight_decay != 0, bool(momentum_buffers), nesterov
    states = [momentum_buffers]
    for programs, arguments, constants in step_launches(params, grads, states, masters, stochastic_rounding):
        sgd_kernel[(programs,)](*arguments, grad_scale, *scalars, *constants, *options, BLOCK, num_warps=WARPS)
