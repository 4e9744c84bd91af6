"""Lion in Triton: one launch for a whole list of tensors.

Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors
from llmsys.ops._list_triton import BLOCK, WARPS, find_block, step_block, step_launches


@triton.jit
def lion_step(p, g, m, nothing, settings):
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = settings
    c = m * beta1 + g * one_minus_beta1
    # Neither above nor below 0 is 0, or NaN: then p becomes NaN too.
    p = p * decay - tl.where(c > 0, lr, tl.where(c < 0, -lr, c))
    return p, m * beta2 + g * one_minus_beta2, nothing


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def lion_kernel(
    table_ptr,
    num_tensors,
    seed_low,
    seed_high,
    grad_scale_ptr,
    lr,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TENSORS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start = find_block(table_ptr, num_tensors, TENSORS, BLOCK)
    step_block(
        lion_step,
        (lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2),
        tensor, start, table_ptr, num_tensors, seed_low, seed_high, grad_scale_ptr,
        PARAM, GRAD, 1, MASTER, STOCHASTIC, MAXIMIZE, BLOCK,
    )  # fmt: skip


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
    for programs, arguments, constants in step_launches(params, grads, [exp_avgs], masters, stochastic_rounding):
        lion_kernel[(programs,)](*arguments, grad_scale, *scalars, *constants, maximize, BLOCK, num_warps=WARPS)
