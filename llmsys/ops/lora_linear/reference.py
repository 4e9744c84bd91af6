"""Linear layer with a low-rank update in plain PyTorch, as its users write it. An empty bias stands for none."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    frozen: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x · lora_aᵀ): see `llmsys.lora_linear`."""
    xa = F.linear(x, lora_a)
    y = (F.linear(x, weight, bias if bias.numel() else None) + scale * F.linear(xa, lora_b)).contiguous()
    return (y if out is None else out.copy_(y)), xa.contiguous()


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor,
    xa: torch.Tensor,
    scale: float,
    frozen: bool,
    out: torch.Tensor | None = None,
) -> Five:
    """(dx, dweight, dlora_a, dlora_b, dbias), empty what is frozen or not there. Computes x · lora_aᵀ again, so that it
    can be differentiated.
    """
    shape, dy, x = x.shape, dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dyb = scale * (dy @ lora_b)
    dx = (dy @ weight + dyb @ lora_a).view(shape)
    dweight = weight.new_empty(0) if frozen else dy.T @ x
    dbias = dy.sum(0) if bias.numel() else torch.empty_like(bias)
    dx = dx if out is None else out.copy_(dx)
    return dx, dweight, dyb.T @ x, scale * (dy.T @ (x @ lora_a.T)), dbias
