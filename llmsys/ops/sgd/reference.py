"""Stochastic gradient descent with momentum in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops._stochastic import first_elements, rounded

Tensors = list[torch.Tensor]


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
    """One step, in place: see `llmsys.ops.sgd`."""
    firsts = first_elements(params)
    for i, param in enumerate(params):
        wide = torch.promote_types(param.dtype, torch.float32)
        p = masters[i] if masters else param.to(wide)  # param itself where it is as wide
        g = grads[i].to(wide)
        if grad_scale is not None:
            g = g * grad_scale
        if maximize:
            g = -g
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum_buffers:
            b = momentum_buffers[i]
            b.mul_(momentum).add_(g, alpha=1 - dampening if step > 1 else 1)
            g = g + momentum * b if nesterov else b
        p.sub_(g, alpha=lr)
        if p is not param:
            param.copy_(p if stochastic_rounding is None else rounded(p, stochastic_rounding, firsts[i]))
