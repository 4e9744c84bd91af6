"""Linear layer with a low-rank update in plain PyTorch, as its users write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x · lora_aᵀ): see `llmsys.lora_linear`."""
    xa = F.linear(x, lora_a)
    y = (F.linear(x, weight, bias) + scale * F.linear(xa, lora_b)).contiguous()
    return (y if out is None else out.copy_(y)), xa.contiguous()


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor,
    scale: float,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dlora_a: bool,
    needs_dlora_b: bool,
    needs_dbias: bool,
    out: torch.Tensor | None = None,
) -> Five:
    """(dx, dweight, dlora_a, dlora_b, dbias), without elements where not needed. Computes x · lora_aᵀ again, so that it
    can be differentiated.
    """
    shape, (dy, x) = x.shape, (torch.atleast_2d(tensor).flatten(0, -2) for tensor in (dy, x))
    dxa, nothing = scale * (dy @ lora_b), x.new_empty(0)
    dx = (dy @ weight + dxa @ lora_a).view(shape) if needs_dx else nothing
    dweight = dy.T @ x if needs_dweight else nothing
    dlora_a = dxa.T @ x if needs_dlora_a else nothing
    dlora_b = scale * (dy.T @ (x @ lora_a.T)) if needs_dlora_b else nothing
    dbias = dy.sum(0) if needs_dbias else nothing
    return (dx if out is None or not needs_dx else out.copy_(dx)), dweight, dlora_a, dlora_b, dbias
