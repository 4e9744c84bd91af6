"""Linear: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.linear import native, reference, torch_gemm

OP = Op(
    "linear",
    forward="(Tensor x, Tensor weight, Tensor? bias=None, str? activation=None, Tensor? residual=None)"
    " -> (Tensor y, Tensor pre)",
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor pre, str? activation, bool needs_dx, "
    "bool needs_dweight, bool needs_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    implementations=[
        native.CPU,
        Impl(
            "torch",
            torch_gemm.forward,
            torch_gemm.backward,
            torch_gemm.why_not,
            backward_in_parts=torch_gemm.backward_in_parts,
        ),
        triton("llmsys.ops.linear.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
    shared_gradients={"residual": "dy"},
    deferrable=("weight",),
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply each row of `x` by `weight`, and finish the product while it is in the cache.

        y = activation(x · weightᵀ + bias) + residual

    `activation` is None, "relu", "relu2" (the square of relu), "silu", "gelu" or "gelu_tanh".

    Shapes     x (..., K) float16/bfloat16/float32/float64, weight (N, K), bias (N,), residual (..., N), of one dtype
               and any strides → y (..., N), contiguous; `out`, where given, is y
    Numerics   products summed in float32 (float64 for float64) and finished there; y rounded once; on the CPU's own
               kernels a row's bits depend neither on the other rows nor on the number of threads
    Gradient   dx, dweight, dbias, dresidual, each only where needed; saves x, weight and, with an activation, what it
               is applied to, in x.dtype; the gradient of that is rounded to x.dtype before it is multiplied
    Cost       2·M·N·K flop, 4·M·N·K backward (M rows): compute-bound; (M·K + N·K + M·N)·itemsize bytes for small M
    Errors     ValueError if shapes do not fit as above, devices differ, the activation is another, or out does not
               fit; TypeError for other or mixed dtypes
    Source     the GEMM: Goto & van de Geijn 2008, ACM TOMS 34(3); relu2: So et al. 2021, arXiv:2109.08668
    """
    _check_arguments(x, weight, bias, activation, residual)
    if out is not None:
        _check.out("linear", out, x.new_empty(()).expand(*x.shape[:-1], weight.shape[0]))
    return OP(x, weight, bias, activation, residual, out=out)


def _check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> None:
    dtype, shape, device = x.dtype, x.shape, x.device
    if dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.linear: x is {dtype}, expected float32, bfloat16, float16 or float64")
    if not shape or weight.dim() != 2 or weight.shape[1] != shape[-1]:
        raise ValueError(
            f"llmsys.linear: x has shape {tuple(shape)} and weight {tuple(weight.shape)}, expected x (..., K) and "
            "weight (N, K)"
        )
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"llmsys.linear: activation is {activation!r}, expected one of {list(native.ACTIVATIONS)}")
    expected = {"weight": (weight, weight.shape)}
    if bias is not None:
        expected["bias"] = (bias, weight.shape[:1])
    if residual is not None:
        expected["residual"] = (residual, torch.Size((*shape[:-1], weight.shape[0])))
    for name, (tensor, fitting) in expected.items():
        if tensor.dtype is not dtype:
            raise TypeError(f"llmsys.linear: {name} is {tensor.dtype}, expected {dtype} (x's)")
        if tensor.shape != fitting or tensor.device != device:
            raise ValueError(
                f"llmsys.linear: {name} has shape {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{tuple(fitting)} on {device}"
            )
