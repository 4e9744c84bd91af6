"""Residual addition, then LayerNorm, in one pass: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.add_layer_norm import native, reference

OP = Op(
    "add_layer_norm",
    forward="(Tensor x, Tensor residual, Tensor? weight=None, Tensor? bias=None, float eps=1e-5)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    backward="(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.add_layer_norm.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
    shared_gradients={"residual": "dx"},
)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `residual` to `x`, then normalise the sum as `layer_norm` does; the sum is the next residual.

        sum = x + residual;  y = layer_norm(sum, weight, bias, eps)

    Shapes     x, residual (..., D) of one float16/bfloat16/float32/float64, any strides; weight, bias (D,) of x's dtype
               or float32, both of one, or None → y, sum (..., D), contiguous; `out`, where given, is (y, sum)
    Numerics   sum rounded to x.dtype, y computed from the rounded sum: equal to `layer_norm(x + residual, …)`
    Gradient   of y and of sum; dx (which is dresidual too), dweight, dbias; saves sum, weight, bias, mean and rstd
    Cost       4·N·D·itemsize bytes, where two separate ops move 5
    Errors     as layer_norm; ValueError or TypeError if residual is not like x
    Source     Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 4
    """
    _check.rows("add_layer_norm", x)
    _check.affine("add_layer_norm", x, x.shape[-1], weight, bias, eps)
    _check.same("add_layer_norm", x=x, residual=residual)
    for result in out or ():
        _check.out("add_layer_norm", result, x)
    return OP(x, residual, weight, bias, eps, out=out)
