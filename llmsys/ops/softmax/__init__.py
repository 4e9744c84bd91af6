"""Softmax of rows: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.softmax import native, reference

OP = Op(
    "softmax",
    forward="(Tensor x) -> (Tensor y)",
    backward="(Tensor dy, Tensor y) -> (Tensor dx)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.softmax.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def softmax(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Make each row of `x` a probability distribution: positive, of sum 1, in proportion to e^x.

        y[..., d] = e^(x[..., d] − max_d(x[..., d])) / sum_d(e^(x[..., d] − max_d(x[..., d])))

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides → y (..., D), contiguous; `out`, where given, is
               y. Another dimension than the last: movedim
    Numerics   in float32 (float64 for float64); y rounded once, to x.dtype; −inf gives 0; a row of −inf alone, or with
               a NaN or +inf, is NaN, as torch.softmax has it; the same bits whatever the number of threads or of rows
    Gradient   dx = y · (dy − sum_d(dy · y)); saves y
    Cost       2·N·D·itemsize bytes, 4·N·D flop, of which N·D exponentials; on a CPU 4·D bytes for each thread
    Errors     ValueError if D == 0 or out does not fit; TypeError for a dtype not named above
    Source     Bridle 1990, doi:10.1007/978-3-642-76153-9_28, less the row's maximum, so that nothing overflows
    """
    _check.rows("softmax", x)
    if out is not None:
        _check.out("softmax", out, x)
    return OP(x, out=out)
