"""LAMB in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops._stochastic import first_elements, rounded


@torch.no_grad()
def forward(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    masters: list[torch.Tensor],
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
    """One step, in place: see `llmsys.ops.lamb`."""
    firsts = first_elements(params)
    correction1 = 1 - beta1**step
    correction2 = (1 - beta2**step) ** 0.5
    for i, (param, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        g = grads[i].to(m.dtype)
        if grad_scale is not None:
            g = g * grad_scale
        if maximize:
            g = -g
        p = masters[i] if masters else param.to(m.dtype)  # param itself where it is as wide
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = weight_decay * p + m / correction1 / (v.sqrt() / correction2).add_(eps)
        weights, direction = (torch.linalg.vector_norm(x.flatten()) for x in (p, u))  # row-major
        p.sub_(lr * torch.where((weights == 0) | (direction == 0), 1.0, weights / direction) * u)
        if p is not param:
            param.copy_(p if stochastic_rounding is None else rounded(p, stochastic_rounding, firsts[i]))
