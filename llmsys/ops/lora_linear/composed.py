"""Linear layer with a low-rank update as a few matrix products, the last of which are added in place: no result of the
size of y or dx but the one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsys.ops._matmul import Matmul, rows
from llmsys.ops._op import Impl
from llmsys.ops.lora_linear.reference import Five


def implementation(name: str, matmul: Matmul, **when: Any) -> Impl:
    """The layer on `matmul`; `when` says where and when it can run, as `Impl` has it."""

    def forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scale: float,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        flat_x = rows(x)
        xa = matmul(flat_x, lora_a.T)
        shape = (*x.shape[:-1], len(weight))
        y = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
        flat = rows(y)
        if bias is not None:
            flat.copy_(bias)
        matmul(flat_x, weight.T, flat, add=bias is not None)
        matmul(xa, lora_b.T, flat, add=True, scale=scale)
        return y, xa.view(*x.shape[:-1], len(lora_a))

    def backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        xa: Tensor,
        scale: float,
        needs_dx: bool,
        needs_dweight: bool,
        needs_dlora_a: bool,
        needs_dlora_b: bool,
        needs_dbias: bool,
        out: Tensor | None = None,
    ) -> Five:
        shape, dy, x = x.shape, rows(dy), rows(x)
        dx = dweight = dlora_a = dlora_b = dbias = x.new_empty(0)
        if needs_dx or needs_dlora_a:
            dxa = matmul(dy, lora_b, scale=scale)
            if needs_dlora_a:
                dlora_a = matmul(dxa.T, x)
            if needs_dx:
                dx = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
                matmul(dy, weight, dx.view(x.shape))
                matmul(dxa, lora_a, dx.view(x.shape), add=True)
        if needs_dweight:
            dweight = matmul(dy.T, x)
        if needs_dlora_b:
            dlora_b = matmul(dy.T, rows(xa), scale=scale)
        if needs_dbias:
            dbias = dy.sum(0)
        return dx, dweight, dlora_a, dlora_b, dbias

    return Impl(name, forward, backward, **when)
