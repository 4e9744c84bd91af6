"""LayerNorm: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.layer_norm import native, reference

OP = Op(
    "layer_norm",
    forward="(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    backward="(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.layer_norm.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shift each row of `x` to mean zero and scale it to variance one, then scale by `weight` and add `bias`.

        y[..., d] = (x[..., d] - mean_d(x)) / sqrt(var_d(x) + eps) · weight[d] + bias[d]

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides; weight, bias (D,) of x's dtype or float32, both
               of one, or None → y (..., D), contiguous; `out`, where given, is y
    Numerics   sums in float32 (float64 for float64); the variance is that of distances from the mean, so rows far from
               zero keep their digits; y rounded once, to x.dtype
    Gradient   dx, dweight, dbias; saves x, weight, bias, mean and rstd (8 bytes per row); the same bits whatever the
               number of threads
    Cost       2·N·D·itemsize bytes, 8·N·D flop: bandwidth-bound
    Errors     ValueError if weight.shape or bias.shape != x.shape[-1:], D == 0, devices differ, or out does not fit;
               TypeError for a dtype not named above
    Source     Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 4
    """
    _check.rows("layer_norm", x)
    _check.affine("layer_norm", x, x.shape[-1], weight, bias, eps)
    if out is not None:
        _check.out("layer_norm", out, x)
    return OP(x, weight, bias, eps, out=out)
