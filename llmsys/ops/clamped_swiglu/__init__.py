"""Clamped SwiGLU: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.clamped_swiglu import native, reference

OP = Op(
    "clamped_swiglu",
    forward="(Tensor gate, Tensor up, float limit=7.0, float alpha=1.702) -> (Tensor y)",
    backward="(Tensor dy, Tensor gate, Tensor up, float limit, float alpha) -> (Tensor dgate, Tensor dup)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.clamped_swiglu.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def clamped_swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply `up`, clamped and one more, by a sigmoid-weighted `gate`, clamped from above: the GLU of gpt-oss.

        y = g · sigmoid(alpha · g) · (u + 1),  g = min(gate, limit),  u = min(max(up, -limit), limit)

    gpt-oss keeps gate and up in turn along one dimension, `x[..., ::2]` and `x[..., 1::2]`: such views are copied, so
    weights are better kept apart.

    Shapes     gate, up (..., D) of one float16/bfloat16/float32/float64, any strides → y (..., D), contiguous;
               `out`, where given, is y
    Numerics   computed in float32 (float64 for float64), exp to 2 ulp; y rounded once
    Gradient   dgate, dup, 0 where a limit is exceeded; saves gate and up
    Cost       3·N·itemsize bytes: bandwidth-bound
    Errors     ValueError if limit <= 0, shapes or devices differ or out does not fit;
               TypeError for other or mixed dtypes
    Source     OpenAI 2025, github.com/openai/gpt-oss, gpt_oss/torch/model.py, `swiglu`
    """
    _check.same("clamped_swiglu", gate=gate, up=up)
    if not limit > 0:
        raise ValueError(f"llmsys.clamped_swiglu: limit is {limit}, expected a number > 0")
    if out is not None:
        _check.out("clamped_swiglu", out, gate)
    return OP(gate, up, limit, alpha, out=out)
