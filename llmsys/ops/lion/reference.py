"""Lion in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops._stochastic import first_elements, rounded

Tensors = list[torch.Tensor]


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
    """One step, in place: see `llmsys.ops.lion`."""
    firsts = first_elements(params)
    for i, (param, m) in enumerate(zip(params, exp_avgs, strict=True)):
        p = masters[i] if masters else param.to(m.dtype)  # param itself where it is as wide
        g = grads[i].to(m.dtype)
        if grad_scale is not None:
            g = g * grad_scale
        if maximize:
            g = -g
        c = beta1 * m + (1 - beta1) * g
        p.mul_(1 - lr * weight_decay).sub_(torch.where(c.isnan(), c, c.sign()), alpha=lr)  # sign(NaN) is 0
        m.mul_(beta2).add_(g, alpha=1 - beta2)
        if p is not param:
            param.copy_(p if stochastic_rounding is None else rounded(p, stochastic_rounding, firsts[i]))
