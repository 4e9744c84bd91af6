"""Rows of length one: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.l2_norm import native, reference

OP = Op(
    "l2_norm",
    forward="(Tensor x, float eps=1e-12) -> (Tensor y, Tensor length)",
    backward="(Tensor dy, Tensor x, Tensor length, float eps) -> (Tensor dx)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.l2_norm.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def l2_norm(x: torch.Tensor, eps: float = 1e-12, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Divide each row of `x` by its length. On queries and keys (B, T, H, K) this is QK-norm, per head.

        y[..., d] = x[..., d] / max(sqrt(sum_d(x[..., d]²)), eps)

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides, heads of a fused projection read where they are
               → y (..., D), contiguous; `out`, where given, is y
    Numerics   sums in float32 (float64 for float64); y rounded once, to x.dtype; as torch.nn.functional.normalize, and
               not x / sqrt(sum + eps), which differs for short rows
    Gradient   dx, which for a row shorter than eps is dy / eps; saves x and its rows' lengths (4 bytes per row)
    Cost       2·N·D·itemsize bytes, 3·N·D flop: bandwidth-bound
    Errors     ValueError if D == 0, eps <= 0, or out does not fit; TypeError for a dtype not named above
    Source     Henry et al. 2020, arXiv:2010.04245, sec. 3
    """
    _check.rows("l2_norm", x)
    if not eps > 0:
        raise ValueError(f"llmsys.l2_norm: eps is {eps}, expected a number > 0: rows of zeros are divided by it")
    if out is not None:
        _check.out("l2_norm", out, x)
    return OP(x, eps, out=out)
