"""Rotary position embedding: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.rope import native, reference
from llmsys.ops.rope.scaling import LinearScaling, Llama3Scaling, NTKScaling, YarnScaling
from llmsys.ops.rope.tables import rope_tables

__all__ = ["OP", "Llama3Scaling", "LinearScaling", "NTKScaling", "YarnScaling", "rope", "rope_tables"]

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
               R <= K, float32 or x's dtype, as `rope_tables` makes them of position ids →
               y (B, T, H, K), contiguous; `out`, where given, is y, contiguous or x itself, whatever its strides
    Numerics   computed in float32 (float64 for float64); y rounded once; x[..., R:] copied
    Gradient   dx, the rotation back; saves cos and sin, not x; none for cos and sin
    Cost       2·N·K·itemsize bytes and the tables once, 3·N·R flop (N = B·T·H): bandwidth-bound
    Errors     ValueError if shapes do not fit as above, devices differ, out does not fit, or cos or sin requires a
               gradient; TypeError for a dtype not named above
    Source     Su et al. 2021, arXiv:2104.09864, eq. 15 (interleaved); pairs (i, i + R/2) as in GPT-NeoX,
               arXiv:2204.06745, and Llama in Hugging Face transformers
    """
    check_arguments("rope", x, cos, sin)
    if out is not None:
        check_out("rope", out, x)
    return OP(x, cos, sin, interleaved, out=out)


def check_arguments(op: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, name_of_x: str = "x") -> None:
    """x (B, T, H, K) of a float dtype; cos and sin a row for each of its tokens, at most K / 2 wide."""
    dtype, shape = x.dtype, x.shape
    if dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.{op}: {name_of_x} is {dtype}, expected float32, bfloat16, float16 or float64")
    if len(shape) != 4:
        raise ValueError(f"llmsys.{op}: {name_of_x} has shape {tuple(shape)}, expected (B, T, H, K)")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype is not torch.float32 and table.dtype is not dtype:
            raise TypeError(f"llmsys.{op}: {name} is {table.dtype}, expected torch.float32 or {dtype} ({name_of_x}'s)")
        if table.device != x.device:
            raise ValueError(
                f"llmsys.{op}: {name} is on {table.device} and {name_of_x} on {x.device}, expected one device"
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"llmsys.{op}: {name} requires a gradient, expected one that does not, as {op} gives none to its "
                f"tables; use {name}.detach()"
            )
    table_shape, tokens = cos.shape, shape[:2]
    if sin.shape != table_shape:
        raise ValueError(
            f"llmsys.{op}: cos has shape {tuple(table_shape)} and sin {tuple(sin.shape)}, expected one shape"
        )
    if len(table_shape) < 2 or table_shape[:-1] not in (tokens, tokens[1:]):
        raise ValueError(
            f"llmsys.{op}: cos and sin have shape {tuple(table_shape)} and {name_of_x} {tuple(shape)}, expected "
            f"({tokens[1]}, R/2) or ({tokens[0]}, {tokens[1]}, R/2): one row for each token of {name_of_x}"
        )
    if 2 * table_shape[-1] > shape[-1]:
        raise ValueError(
            f"llmsys.{op}: cos and sin have {table_shape[-1]} columns and {name_of_x}'s heads {shape[-1]} elements, "
            f"expected at most {shape[-1] // 2}, one for each pair; of tables whose halves are equal, give the first"
        )


def check_out(op: str, out: torch.Tensor, x: torch.Tensor) -> None:
    """`out` can take the rotated `x`: it is a contiguous tensor like x, or x itself, its elements all apart."""
    same_memory = out.data_ptr() == x.data_ptr() and out.stride() == x.stride() and out.shape == x.shape
    if same_memory and out.dtype == x.dtype and x.stride(-1) == 1 and not overlaps(x):
        return
    _check.out(op, out, x)


def overlaps(x: torch.Tensor) -> bool:
    """Whether two elements of `x` may share memory, by its strides."""
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < span:
                return True
            span = stride * (size - 1) + span
    return False
