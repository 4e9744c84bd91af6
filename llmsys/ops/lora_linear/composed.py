"""Linear layer with a low-rank update as a few matrix products, the last of which are added in place: no result of the
size of y or dx but the one.
"""

from __future__ import annotations

import torch

from llmsys.ops.lora_linear.products import add_product, product
from llmsys.ops.lora_linear.reference import Five


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
    rows = x.reshape(-1, x.shape[-1])
    xa = product(rows, lora_a.T)
    shape = (*x.shape[:-1], weight.shape[0])
    y = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    flat = y.view(-1, weight.shape[0])
    if bias.numel():
        add_product(flat.copy_(bias), rows, weight.T)
    else:
        product(rows, weight.T, out=flat)
    add_product(flat, xa, lora_b.T, scale)
    return y, xa.view(*x.shape[:-1], len(lora_a))


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
    shape, dy, x = x.shape, dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dyb = product(dy, lora_b).mul_(scale)
    dx = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    product(dy, weight, out=dx.view(x.shape))
    add_product(dx.view(x.shape), dyb, lora_a)
    dweight = weight.new_empty(0) if frozen else product(dy.T, x)
    dlora_b = product(dy.T, xa.reshape(-1, len(lora_a))).mul_(scale)
    dbias = dy.sum(0) if bias.numel() else torch.empty_like(bias)
    return dx, dweight, product(dyb.T, x), dlora_b, dbias
