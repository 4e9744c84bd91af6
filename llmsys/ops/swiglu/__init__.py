"""SwiGLU: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.swiglu import native, reference

OP = Op(
    "swiglu",
    forward="(Tensor gate, Tensor up) -> (Tensor y)",
    backward="(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.swiglu.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply `up` by the SiLU of `gate`.

        y = gate · sigmoid(gate) · up

    Shapes     gate, up (..., D) of one float16/bfloat16/float32/float64, any strides → y (..., D), contiguous;
               `out`, where given, is y
    Numerics   computed in float32 (float64 for float64), exp to 2 ulp; y rounded once
    Gradient   dgate, dup; saves gate and up
    Cost       3·N·itemsize bytes: bandwidth-bound
    Errors     ValueError if shapes or devices differ or out does not fit; TypeError for other or mixed dtypes
    Source     Shazeer 2020, arXiv:2002.05202, eq. 6
    """
    _check.same("swiglu", gate=gate, up=up)
    if out is not None:
        _check.out("swiglu", out, gate)
    return OP(gate, up, out=out)
