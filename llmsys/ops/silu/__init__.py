"""SiLU: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.silu import native, reference

OP = Op(
    "silu",
    forward="(Tensor x) -> (Tensor y)",
    backward="(Tensor dy, Tensor x) -> (Tensor dx)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.silu.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def silu(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply each element of `x` by its sigmoid.

        y = x · sigmoid(x)

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides → y (..., D), contiguous;
               `out`, where given, is y
    Numerics   computed in float32 (float64 for float64), exp to 2 ulp; y rounded once
    Gradient   dx; saves x
    Cost       2·N·itemsize bytes: bandwidth-bound
    Errors     ValueError if out does not fit; TypeError for other dtypes
    Source     Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2; Ramachandran et al. 2017, arXiv:1710.05941
    """
    _check.same("silu", x=x)
    if out is not None:
        _check.out("silu", out, x)
    return OP(x, out=out)
