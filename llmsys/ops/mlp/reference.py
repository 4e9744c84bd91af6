"""The gated feed-forward layer in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmsys.ops.geglu import reference as geglu
from llmsys.ops.reglu import reference as reglu
from llmsys.ops.swiglu import reference as swiglu

GLUS = {"silu": (swiglu, ()), "gelu": (geglu, ("none",)), "gelu_tanh": (geglu, ("tanh",)), "relu": (reglu, ())}


def forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, activation: str, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gate, up): see `llmsys.mlp`."""
    glu, options = GLUS[activation]
    gate, up = linear(x, gate_weight), linear(x, up_weight)
    y = linear(glu.forward(gate, up, *options), down_weight)
    return y if out is None else out.copy_(y), gate, up


def backward(
    dy: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    needs_dx: bool,
    needs_dgate_weight: bool,
    needs_dup_weight: bool,
    needs_ddown_weight: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_weight, dup_weight, ddown_weight), without elements where not needed. gate and up are computed again,
    so that this too has a gradient."""
    glu, options = GLUS[activation]
    gate, up = linear(x, gate_weight), linear(x, up_weight)
    h = glu.forward(gate, up, *options)
    dgate, dup = glu.backward(dy @ down_weight, gate, up, *options)
    nothing = x.new_empty(0)
    dx = dgate @ gate_weight + dup @ up_weight if needs_dx else nothing
    dx = dx if out is None or not needs_dx else out.copy_(dx)
    x, dy, h, dgate, dup = (torch.atleast_2d(tensor).flatten(0, -2) for tensor in (x, dy, h, dgate, dup))
    pairs = ((needs_dgate_weight, dgate, x), (needs_dup_weight, dup, x), (needs_ddown_weight, dy, h))
    return dx, *(dout.T @ given if needed else nothing for needed, dout, given in pairs)  # type: ignore[return-value]
