"""Rotary position embedding: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.rope import native, reference
from llmsys.ops.rope.tables import rope_tables

__all__ = ["OP", "rope", "rope_tables"]

OP = Op(
    "rope",
    forward="(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> (Tensor y)",
    backward="(Tensor dy, Tensor cos, Tensor sin, bool interleaved) -> (Tensor dx)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.rope.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate pairs of elements of each head of `x` by the angles of its token's position.

        y[..., i]       = x[..., i] · cos[i] - x[..., i + R/2] · sin[i]         0 <= i < R/2
        y[..., i + R/2] = x[..., i + R/2] · cos[i] + x[..., i] · sin[i]
        y[..., R:]      = x[..., R:]

    With `interleaved`, pair i is elements 2i and 2i + 1.

    Shapes     x (B, T, H, K) float16/bfloat16/float32/float64, any strides; cos, sin (T, R/2) or (B, T, R/2) with
               R <= K, float32 or x's dtype, as `rope_tables` makes them → y (B, T, H, K), contiguous; `out`, where
               given, is y, and may be x itself
    Numerics   computed in float32 (float64 for float64); y rounded once; x[..., R:] copied
    Gradient   dx, the rotation back; saves cos and sin, not x; none for cos and sin
    Cost       2·N·K·itemsize bytes and the tables once, 3·N·R flop (N = B·T·H): bandwidth-bound
    Errors     ValueError if shapes do not fit as above, devices differ, out does not fit, or cos or sin requires a
               gradient; TypeError for a dtype not named above
    Source     Su et al. 2021, arXiv:2104.09864, eq. 15 (interleaved); pairs (i, i + R/2) as in GPT-NeoX,
               arXiv:2204.06745, and Llama in Hugging Face transformers
    """
    _check_arguments(x, cos, sin)
    if out is not None:
        _check.out("rope", out, x)
    return OP(x, cos, sin, interleaved, out=out)


def _check_arguments(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    dtype, shape = x.dtype, x.shape
    if dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.rope: x is {dtype}, expected float32, bfloat16, float16 or float64")
    if len(shape) != 4:
        raise ValueError(f"llmsys.rope: x has shape {tuple(shape)}, expected (B, T, H, K)")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype is not torch.float32 and table.dtype is not dtype:
            raise TypeError(f"llmsys.rope: {name} is {table.dtype}, expected torch.float32 or {dtype} (x's)")
        if table.device != x.device:
            raise ValueError(f"llmsys.rope: {name} is on {table.device} and x on {x.device}, expected one device")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"llmsys.rope: {name} requires a gradient, expected one that does not, as rope gives none to its "
                f"tables; use {name}.detach()"
            )
    table_shape, tokens = cos.shape, shape[:2]
    if sin.shape != table_shape:
        raise ValueError(
            f"llmsys.rope: cos has shape {tuple(table_shape)} and sin {tuple(sin.shape)}, expected one shape"
        )
    if len(table_shape) < 2 or table_shape[:-1] not in (tokens, tokens[1:]):
        raise ValueError(
            f"llmsys.rope: cos and sin have shape {tuple(table_shape)} and x {tuple(shape)}, expected "
            f"({tokens[1]}, R/2) or ({tokens[0]}, {tokens[1]}, R/2): one row for each token of x"
        )
    if 2 * table_shape[-1] > shape[-1]:
        raise ValueError(
            f"llmsys.rope: cos and sin have {table_shape[-1]} columns and x's heads {shape[-1]} elements, expected at "
            f"most {shape[-1] // 2}, one for each pair; of tables whose halves are equal, give the first"
        )
