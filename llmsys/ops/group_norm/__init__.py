"""GroupNorm: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.group_norm import native, reference

OP = Op(
    "group_norm",
    forward="(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    backward="(Tensor dy, Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.group_norm.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise each group of channels of each sample to mean zero and variance one, then scale and shift each channel.

        y[n, c, ...] = (x[n, c, ...] - mean) / sqrt(var + eps) · weight[c] + bias[c]

    with mean and var over the channels of c's group, C / num_groups of them, and all of `...`.

    Shapes     x (N, C, ...) float16/bfloat16/float32/float64, copied unless contiguous; weight, bias (C,) of x's dtype
               or float32, both of one, or None → y like x, contiguous; `out`, where given, is y
    Numerics   sums in float32 (float64 for float64); the variance is that of distances from the mean; y rounded once
    Gradient   dx, dweight, dbias; saves x, weight, bias, mean and rstd (8 bytes per group); the same bits whatever the
               number of threads
    Cost       2·numel·itemsize bytes, 8·numel flop: bandwidth-bound where a group fits the cache
    Errors     ValueError if num_groups does not divide C, weight.shape or bias.shape != (C,), a group is empty, devices
               differ, or out does not fit; TypeError for a dtype not named above
    Source     Wu & He 2018, arXiv:1803.08494, eq. 7
    """
    _check.same("group_norm", x=x)
    shape = x.shape
    if len(shape) < 2 or shape[1:].numel() == 0:
        raise ValueError(f"llmsys.group_norm: x has shape {tuple(shape)}, expected (N, C, ...), nothing empty but N")
    if num_groups < 1 or shape[1] % num_groups:
        raise ValueError(f"llmsys.group_norm: {num_groups} groups of {shape[1]} channels, expected a divisor of them")
    _check.affine("group_norm", x, shape[1], weight, bias, eps)
    if out is not None:
        _check.out("group_norm", out, x)
    return OP(x, num_groups, weight, bias, eps, out=out)
