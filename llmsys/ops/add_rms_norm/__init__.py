"""Residual addition, then RMSNorm, in one pass: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.add_rms_norm import native, reference

OP = Op(
    "add_rms_norm",
    forward="(Tensor x, Tensor residual, Tensor weight, float eps=1e-6, float weight_offset=0.0)"
    " -> (Tensor y, Tensor sum, Tensor rstd)",
    backward="(Tensor dy, Tensor? dsum, Tensor sum, Tensor weight, Tensor rstd, float eps, float weight_offset)"
    " -> (Tensor dx, Tensor dweight)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.add_rms_norm.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
    shared_gradients={"residual": "dx"},
)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `residual` to `x`, then normalise the sum as `rms_norm` does; the sum is the next residual.

        sum = x + residual;  y = rms_norm(sum, weight, eps)

    Shapes     x, residual (..., D) of one float16/bfloat16/float32/float64, any strides; weight (D,) of x's dtype or
               float32 → y, sum (..., D), contiguous; `out`, where given, is (y, sum)
    Numerics   sum rounded to x.dtype, y computed from the rounded sum: equal to `rms_norm(x + residual, weight)`
    Gradient   of y and of sum; dx (which is dresidual too) and dweight; saves sum, weight and rstd
    Cost       4·N·D·itemsize bytes, where two separate ops move 5
    Errors     as rms_norm; ValueError or TypeError if residual is not like x
    Source     Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4
    """
    _check.norm("add_rms_norm", x, weight, eps)
    _check.same("add_rms_norm", x=x, residual=residual)
    for result in out or ():
        _check.out("add_rms_norm", result, x)
    return OP(x, residual, weight, eps, weight_offset, out=out)
