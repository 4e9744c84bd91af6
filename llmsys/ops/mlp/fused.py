"""The gated feed-forward layer from matrix products and the fused gated unit of its activation.

`linear` and `linear_backward` are the one place that multiplies matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmsys.ops._op import Op
from llmsys.ops.geglu import OP as GEGLU
from llmsys.ops.reglu import OP as REGLU
from llmsys.ops.swiglu import OP as SWIGLU

# Activation → the op that computes f(gate) · up, and what it takes besides the two.
GLUS: dict[str, tuple[Op, tuple]] = {
    "silu": (SWIGLU, ()),
    "gelu": (GEGLU, ("none",)),
    "gelu_tanh": (GEGLU, ("tanh",)),
    "relu": (REGLU, ()),
}


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of `linear(x, weight)`."""
    return dy @ weight, rows(dy).T @ rows(x)


def rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its last dimension's vectors."""
    return torch.atleast_2d(x).flatten(0, -2)


def forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, activation: str, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gate, up)."""
    glu, options = GLUS[activation]
    gate, up = linear(x, gate_weight), linear(x, up_weight)
    h = glu.select(gate, up, *options).forward(gate, up, *options)
    y = linear(h, down_weight)
    return y if out is None else out.copy_(y), gate, up


def infer(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, activation: str, out: Tensor | None = None
) -> Tensor:
    """y; h takes the memory of gate, which nothing needs any more."""
    glu, options = GLUS[activation]
    gate, up = linear(x, gate_weight), linear(x, up_weight)
    h = glu.select(gate, up, *options).forward(gate, up, *options, out=gate)
    y = linear(h, down_weight)
    return y if out is None else out.copy_(y)


def backward(
    dy: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_weight, dup_weight, ddown_weight)."""
    glu, options = GLUS[activation]
    kernels = glu.select(gate, up, *options)
    dh, ddown_weight = linear_backward(dy, kernels.forward(gate, up, *options), down_weight)
    assert kernels.backward is not None
    dgate, dup = kernels.backward(dh, gate, up, *options)
    dx_gate, dgate_weight = linear_backward(dgate, x, gate_weight)
    dx_up, dup_weight = linear_backward(dup, x, up_weight)
    dx = dx_gate.add_(dx_up) if out is None else torch.add(dx_gate, dx_up, out=out)
    return dx, dgate_weight, dup_weight, ddown_weight
