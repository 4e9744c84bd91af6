"""AdamW in Triton: one launch for a whole list of tensors.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, in the form torch.optim.AdamW computes it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors
from llmsys.ops._list_triton import BLOCK, WARPS, find_block, step_block, step_launches


@triton.jit
def update_moments(g, m, v, toward_grad, beta2, one_minus_beta2, FROM_GRAD: tl.constexpr):
    m = (g if FROM_GRAD else m) + (g - m) * toward_grad  # torch.lerp's two forms
    return m, v * beta2 + g * one_minus_beta2 * g


def moment_settings(beta1: float, beta2: float) -> tuple[tuple[float, float, float], bool]:
    """The last arguments of `update_moments`."""
    from_grad = beta1 <= 0.5
    return (-beta1 if from_grad else 1 - beta1, beta2, 1 - beta2), from_grad


@triton.jit
def adam_direction(m, v, step_size, sqrt_bias_correction2, eps):
    return step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), sqrt_bias_correction2) + eps)


@triton.jit
def adamw_step(p, g, m, v, settings):
    decay, toward_grad, beta2, one_minus_beta2, step_size, sqrt_bias_correction2, eps, FROM_GRAD = settings
    m, v = update_moments(g, m, v, toward_grad, beta2, one_minus_beta2, FROM_GRAD)
    return p * decay - adam_direction(m, v, step_size, sqrt_bias_correction2, eps), m, v


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def adamw_kernel(
    table_ptr,
    num_tensors,
    seed_low,
    seed_high,
    grad_scale_ptr,
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
    STOCHASTIC: tl.constexpr,
    TENSORS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FROM_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start = find_block(table_ptr, num_tensors, TENSORS, BLOCK)
    step_block(
        adamw_step,
        (decay, toward_grad, beta2, one_minus_beta2, step_size, sqrt_bias_correction2, eps, FROM_GRAD),
        tensor, start, table_ptr, num_tensors, seed_low, seed_high, grad_scale_ptr,
        PARAM, GRAD, 2, MASTER, STOCHASTIC, MAXIMIZE, BLOCK,
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
    step_size, correction2 = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    scalars = 1 - lr * weight_decay, *moments, step_size, correction2, eps
    states = [exp_avgs, exp_avg_sqs]
    for programs, arguments, constants in step_launches(params, grads, states, masters, stochastic_rounding):
        adamw_kernel[(programs,)](
            *arguments, grad_scale, *scalars, *constants, maximize, from_grad, BLOCK, num_warps=WARPS
        )
