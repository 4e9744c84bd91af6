"""GELU: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.gelu import native, reference

OP = Op(
    "gelu",
    forward='(Tensor x, str approximate="none") -> (Tensor y)',
    backward="(Tensor dy, Tensor x, str approximate) -> (Tensor dx)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.gelu.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def gelu(x: torch.Tensor, *, approximate: str = "none", out: torch.Tensor | None = None) -> torch.Tensor:
    """Weigh each element of `x` by the probability that a standard normal number is below it.

        y = x · Φ(x), Φ(x) = (1 + erf(x/√2)) / 2
        approximate="tanh": Φ(x) ≈ (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2

    Shapes     x (..., D) float16/bfloat16/float32/float64, any strides → y (..., D), contiguous;
               `out`, where given, is y
    Numerics   computed in float32 (float64 for float64); on the CPU's kernels Φ is right to 3 ulp for x >= 0 and to
               7 ulp below, where PyTorch's vanishes at -5.5; y rounded once
    Gradient   dx; saves x
    Cost       2·N·itemsize bytes: bandwidth-bound
    Errors     ValueError if out does not fit, or `approximate` is another;
               TypeError for other dtypes
    Source     Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2
    """
    _check.same("gelu", x=x)
    _check.approximate("gelu", approximate)
    if out is not None:
        _check.out("gelu", out, x)
    return OP(x, approximate, out=out)
