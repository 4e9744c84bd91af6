"""RMSNorm: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.rms_norm import native, reference

OP = Op(
    "rms_norm",
    forward="(Tensor x, Tensor weight, float eps=1e-6, float weight_offset=0.0) -> (Tensor y, Tensor rstd)",
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float eps, float weight_offset)"
    " -> (Tensor dx, Tensor dweight)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.rms_norm.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divide each row of `x` by its root mean square, then scale by `weight`.

        y[..., d] = x[..., d] / sqrt(mean_d(x[..., d]²) + eps) · (weight[d] + weight_offset)

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides; weight (D,) of x's dtype or float32
               → y (..., D), contiguous; `out`, where given, is y
    Numerics   sums in float32 (float64 for float64); y rounded once, to x.dtype
    Gradient   dx, dweight; saves x, weight and rstd (4 bytes per row); the same bits whatever the number of threads
    Cost       2·N·D·itemsize bytes, 4·N·D flop: bandwidth-bound
    Errors     ValueError if weight.shape != x.shape[-1:], D == 0, devices differ, or out does not fit;
               TypeError for a dtype not named above
    Source     Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; weight_offset=1 as in Gemma, arXiv:2403.08295
    """
    _check.norm("rms_norm", x, weight, eps)
    if out is not None:
        _check.out("rms_norm", out, x)
    return OP(x, weight, eps, weight_offset, out=out)
