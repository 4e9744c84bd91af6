"""Dropout: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.dropout import native, reference

OP = Op(
    "dropout",
    forward="(Tensor x, float p=0.5, int seed=0, int offset=0) -> (Tensor y)",
    backward="(Tensor dy, float p, int seed, int offset) -> (Tensor dx)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.dropout.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def dropout(
    x: torch.Tensor, p: float = 0.5, *, seed: int, offset: int = 0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Set elements of `x` to zero with probability `p` and divide the others by 1 - p.

        y[i] = x[i] / (1 - p) if word(offset + i) >= p · 2³² else 0,        i the place in row-major order

    word(n) is word n % 4 of Philox-4x32-10 with key `seed` and counter n // 4: the same on every device, for every
    dtype, and for a piece of x that is given where it starts as `offset`.

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides → y (..., D), contiguous; `out`, where given,
               is y
    Numerics   x times 1 / (1 - p), both in float32 (float64 for float64); y rounded once; what is dropped is 0, a NaN
               too; p is exact to 2⁻³², rounded up
    Gradient   dx, with the words computed again; saves nothing
    Cost       2·N·itemsize bytes, and on a CPU about 5 vector instructions an element for the words: bound by
               bandwidth for float32, by arithmetic for 16-bit types on narrow machines
    Errors     ValueError if p is outside [0, 1], seed outside [-2⁶³, 2⁶⁴), offset negative or offset + N beyond 2⁶³,
               or out does not fit; TypeError for a dtype not named above
    Source     Srivastava et al. 2014, JMLR 15, section 4 (scaled in training: section 10); words: Salmon et al. 2011,
               doi:10.1145/2063384.2063405, section 3.3
    """
    _check.same("dropout", x=x)
    if not 0 <= p <= 1:
        raise ValueError(f"llmsys.dropout: p is {p}, expected a probability in [0, 1]")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"llmsys.dropout: seed is {seed}, expected an integer in [-2**63, 2**64)")
    if not 0 <= offset < 2**63 or offset + x.numel() > 2**63:
        raise ValueError(
            f"llmsys.dropout: offset is {offset} for {x.numel()} elements, expected 0 <= offset < 2**63 and "
            "offset + elements <= 2**63"
        )
    if out is not None:
        _check.out("dropout", out, x)
    return OP(x, float(p), seed if seed < 2**63 else seed - 2**64, offset, out=out)
