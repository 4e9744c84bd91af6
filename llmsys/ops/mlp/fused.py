"""The gated feed-forward layer from matrix products and the fused gated unit of its activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmsys.ops._matmul import Matmul, rows
from llmsys.ops._op import Impl, Op
from llmsys.ops.geglu import OP as GEGLU
from llmsys.ops.reglu import OP as REGLU
from llmsys.ops.sink import Product, made
from llmsys.ops.swiglu import OP as SWIGLU

# Activation → the op that computes f(gate) · up, and what it takes besides the two.
GLUS: dict[str, tuple[Op, tuple]] = {
    "silu": (SWIGLU, ()),
    "gelu": (GEGLU, ("none",)),
    "gelu_tanh": (GEGLU, ("tanh",)),
    "relu": (REGLU, ()),
}


def implementation(name: str, matmul: Matmul, **when: Any) -> Impl:
    """The layer on `matmul`; `when` says where and when it can run, as `Impl` has it."""

    def project(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        flat = None if out is None else rows(out)
        return matmul(rows(x), weight.T, flat).view(*x.shape[:-1], len(weight))

    def forward(
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        activation: str,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(y, gate, up)."""
        glu, options = GLUS[activation]
        gate, up = project(x, gate_weight), project(x, up_weight)
        h = glu.select(gate, up, *options).forward(gate, up, *options)
        return project(h, down_weight, out), gate, up

    def infer(
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        activation: str,
        out: Tensor | None = None,
    ) -> Tensor:
        """y; h takes the memory of gate, which nothing needs any more."""
        glu, options = GLUS[activation]
        gate, up = project(x, gate_weight), project(x, up_weight)
        h = glu.select(gate, up, *options).forward(gate, up, *options, out=gate)
        return project(h, down_weight, out)

    def backward_in_parts(
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
        *,
        out: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor | Product, ...]]]:
        """(dx and nothing else), and what gives (nothing, dgate_weight, dup_weight, ddown_weight)."""
        glu, options = GLUS[activation]
        kernels = glu.select(gate, up, *options)
        dy, rows_of_x = rows(dy), rows(x)
        dx = dgate = dup = nothing = x.new_empty(0)
        if needs_dx or needs_dgate_weight or needs_dup_weight:
            assert kernels.backward is not None
            dh = matmul(dy, down_weight).view(gate.shape)
            dgate, dup = map(rows, kernels.backward(dh, gate, up, *options))
        if needs_dx:
            flat = matmul(dgate, gate_weight, None if out is None else out.view(rows_of_x.shape))
            dx = matmul(dup, up_weight, flat, add=True).view(x.shape)

        def weights() -> tuple[Tensor | Product, ...]:
            dgate_weight = Product(matmul, dgate.T, rows_of_x) if needs_dgate_weight else nothing
            dup_weight = Product(matmul, dup.T, rows_of_x) if needs_dup_weight else nothing
            if not needs_ddown_weight:
                return nothing, dgate_weight, dup_weight, nothing
            h = rows(kernels.forward(gate, up, *options))
            return nothing, dgate_weight, dup_weight, Product(matmul, dy.T, h)

        return (dx, nothing, nothing, nothing), weights

    def backward(*args: Any, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """(dx, dgate_weight, dup_weight, ddown_weight), without elements where not needed."""
        (dx, *_), weights = backward_in_parts(*args, out=out)
        return dx, *map(made, weights()[1:])

    return Impl(name, forward, backward, infer=infer, backward_in_parts=backward_in_parts, **when)
