"""ReGLU: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.reglu import native, reference

OP = Op(
    "reglu",
    forward="(Tensor gate, Tensor up) -> (Tensor y)",
    backward="(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.reglu.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def reglu(gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply `up` by what of `gate` is above zero.

        y = max(gate, 0) · up

    Shapes     gate, up (..., D) of one float16/bfloat16/float32/float64, any strides → y (..., D), contiguous;
               `out`, where given, is y
    Numerics   computed in float32 (float64 for float64); y rounded once
    Gradient   dgate, dup; saves gate and up
    Cost       3·N·itemsize bytes: bandwidth-bound
    Errors     ValueError if shapes or devices differ or out does not fit; TypeError for other or mixed dtypes
    Source     Shazeer 2020, arXiv:2002.05202, eq. 5
    """
    _check.same("reglu", gate=gate, up=up)
    if out is not None:
        _check.out("reglu", out, gate)
    return OP(gate, up, out=out)
