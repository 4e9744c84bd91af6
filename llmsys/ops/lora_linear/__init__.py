"""Linear layer with a low-rank update: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._matmul import torch_matmul
from llmsys.ops._op import Impl, Op
from llmsys.ops.lora_linear import composed, native, reference
from llmsys.ops.lora_linear.merge import lora_merge, lora_unmerge

__all__ = ["OP", "lora_linear", "lora_merge", "lora_unmerge"]

OP = Op(
    "lora_linear",
    forward="(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias=None, float scale=1.0)"
    " -> (Tensor y, Tensor xa)",
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor xa, float scale, bool needs_dx,"
    " bool needs_dweight, bool needs_dlora_a, bool needs_dlora_b, bool needs_dbias)"
    " -> (Tensor dx, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias)",
    implementations=[
        native.CPU,
        composed.implementation("torch", torch_matmul),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a weight and by a low-rank update of it, whose product is never formed.

        y = x · weightᵀ + bias + scale · (x · lora_aᵀ) · lora_bᵀ

    Shapes     x (..., K), weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,), of one float16/bfloat16/float32/
               float64, any strides → y (..., N), contiguous
    Numerics   products as `linear`'s; x · lora_aᵀ and the base product with the bias are rounded to x.dtype before the
               last product is added to the base
    Gradient   dx, dweight, dlora_a, dlora_b, dbias, each only where needed: a frozen weight costs no product; saves x,
               the weights and x · lora_aᵀ (R numbers a row)
    Cost       2·M·(N·K + R·(N + K)) flop, twice that backward with the base frozen less 2·M·N·K (M rows):
               compute-bound
    Errors     ValueError if shapes do not fit as above or devices differ; TypeError for other or mixed dtypes
    Source     Hu et al. 2021, arXiv:2106.09685, eq. 3
    """
    _check_arguments(x, weight, lora_a, lora_b, bias)
    return OP(x, weight, lora_a, lora_b, bias, float(scale))


def _check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if x.dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.lora_linear: x is {x.dtype}, expected float32, bfloat16, float16 or float64")
    others = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b} | ({} if bias is None else {"bias": bias})
    for name, tensor in others.items():
        if tensor.dtype is not x.dtype:
            raise TypeError(f"llmsys.lora_linear: {name} is {tensor.dtype}, expected {x.dtype}, as x is")
        if tensor.device != x.device:
            raise ValueError(
                f"llmsys.lora_linear: {name} is on {tensor.device} and x on {x.device}, expected one device"
            )
    fits = x.dim() > 0 and [t.dim() for t in others.values()] == [2, 2, 2, 1][: len(others)]
    if fits:
        (rows, columns), rank = weight.shape, len(lora_a)
        shapes = [(rows, columns), (rank, columns), (rows, rank), (rows,)]
        fits = x.shape[-1] == columns and [tuple(t.shape) for t in others.values()] == shapes[: len(others)]
    if not fits:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in {"x": x, **others}.items())
        raise ValueError(
            f"llmsys.lora_linear: the shapes are {given}, expected x (..., K), weight (N, K), lora_a (R, K), "
            "lora_b (N, R) and bias (N,)"
        )
