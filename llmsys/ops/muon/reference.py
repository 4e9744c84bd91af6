"""Muon in plain PyTorch, whose matrix products are nearly all of its work."""

from __future__ import annotations

import math

import torch

from llmsys.ops._stochastic import first_elements, rounded

Tensors = list[torch.Tensor]

ADJUSTMENTS = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / max(columns, 1))),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


@torch.no_grad()
def forward(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    masters: Tensors,
    lr: float,
    adjust_lr_fn: str,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    a: float,
    b: float,
    c: float,
    eps: float,
    ns_steps: int,
    grad_scale: torch.Tensor | None,
    maximize: bool,
    stochastic_rounding: int | None,
) -> None:
    """One step, in place: see `llmsys.ops.muon`."""
    firsts = first_elements(params)
    for i, (param, buffer) in enumerate(zip(params, momentum_buffers, strict=True)):
        g = grads[i].to(buffer.dtype)
        if grad_scale is not None:
            g = g * grad_scale
        if maximize:
            g = -g
        buffer.lerp_(g, 1 - momentum)
        x = orthogonalized(g.lerp(buffer, momentum) if nesterov else buffer, (a, b, c), eps, ns_steps)
        p = masters[i] if masters else param.to(buffer.dtype)  # param itself where it is as wide
        p.mul_(1 - lr * weight_decay).add_(x, alpha=-lr * ADJUSTMENTS[adjust_lr_fn](*param.shape))
        if p is not param:
            param.copy_(p if stochastic_rounding is None else rounded(p, stochastic_rounding, firsts[i]))


def orthogonalized(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], eps: float, steps: int
) -> torch.Tensor:
    """A matrix with the same singular vectors and singular values near 1, in bfloat16 (float64 of float64)."""
    a, b, c = coefficients
    x = (matrix if matrix.dtype == torch.float64 else matrix.bfloat16()).contiguous()  # one order, whatever the layout
    tall = x.shape[0] > x.shape[1]
    if tall:  # the smaller of the two products x xᵀ and xᵀ x
        x = x.mT
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.addmm(x, torch.addmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
