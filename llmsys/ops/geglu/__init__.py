"""GEGLU: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.geglu import native, reference

OP = Op(
    "geglu",
    forward='(Tensor gate, Tensor up, str approximate="none") -> (Tensor y)',
    backward="(Tensor dy, Tensor gate, Tensor up, str approximate) -> (Tensor dgate, Tensor dup)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.geglu.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def geglu(
    gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "none", out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply `up` by the GELU of `gate`.

        y = gelu(gate) · up, `approximate` as in `gelu`

    Shapes     gate, up (..., D) of one float16/bfloat16/float32/float64, any strides → y (..., D), contiguous;
               `out`, where given, is y
    Numerics   computed in float32 (float64 for float64), GELU as in `gelu`; y rounded once
    Gradient   dgate, dup; saves gate and up
    Cost       3·N·itemsize bytes: bandwidth-bound
    Errors     ValueError if shapes or devices differ or out does not fit, or `approximate` is another;
               TypeError for other or mixed dtypes
    Source     Shazeer 2020, arXiv:2002.05202, eq. 5
    """
    _check.same("geglu", gate=gate, up=up)
    _check.approximate("geglu", approximate)
    if out is not None:
        _check.out("geglu", out, gate)
    return OP(gate, up, approximate, out=out)
