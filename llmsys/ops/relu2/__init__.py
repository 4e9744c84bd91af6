"""Squared ReLU: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.relu2 import native, reference

OP = Op(
    "relu2",
    forward="(Tensor x) -> (Tensor y)",
    backward="(Tensor dy, Tensor x) -> (Tensor dx)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.relu2.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def relu2(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Square what of `x` is above zero.

        y = max(x, 0)²

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides → y (..., D), contiguous;
               `out`, where given, is y
    Numerics   computed in float32 (float64 for float64); y rounded once
    Gradient   dx; saves x
    Cost       2·N·itemsize bytes: bandwidth-bound
    Errors     ValueError if out does not fit; TypeError for other dtypes
    Source     So et al. 2021, arXiv:2109.08668 (Primer's squared ReLU)
    """
    _check.same("relu2", x=x)
    if out is not None:
        _check.out("relu2", out, x)
    return OP(x, out=out)
