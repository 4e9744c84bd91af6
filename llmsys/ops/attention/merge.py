"""Attention of keys that several ranks, or several parts of a cache, hold: each gives y and lse, which are merged here.

Source     ring attention: Liu et al. 2023, arXiv:2310.01889; split over keys: Dao et al. 2023,
           crfm.stanford.edu/2023/10/12/flashdecoding
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsys.ops import _check


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(y, lse) of attention to all keys, from the y and lse of attention to each part of them.

        lse = log Σ_i e^lses[i],    y = Σ_i e^(lses[i] − lse) · outs[i]

    Parts may be merged in any grouping: what is merged is a part again.

    Shapes     outs (B, T, H, E), lses (B, H, T); or packed, (total, H, E) and (H, total); one or more, each list of one
               shape → y as outs, contiguous; lse as lses
    Dtypes     outs float16/bfloat16/float32/float64; lses float32 (float64 for float64)
    Numerics   in float32 (float64 for float64), shifted by the largest lse: nothing overflows; y rounded once, to the
               dtype of outs. A part whose lse is −inf weighs nothing, whatever its y; of nothing but those y is 0
    Gradient   to outs and lses, by PyTorch
    Cost       outs in and y out
    Errors     ValueError if no part is given, or shapes or devices do not fit as above; TypeError for other dtypes
    """
    _check_parts(outs, lses)
    highest = torch.stack([lse.detach() for lse in lses]).amax(0)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = [torch.exp(lse - shift) for lse in lses]
    total = torch.stack(weights).sum(0)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)  # log 0 would have a gradient of NaN
    y = torch.zeros_like(outs[0], dtype=lses[0].dtype, memory_format=torch.contiguous_format)
    for out, lse, weight in zip(outs, lses, weights, strict=True):
        seen = out.to(y.dtype).masked_fill(_of_elements(lse == -torch.inf), 0.0)
        y = y + _of_elements(weight / total) * seen
    return y.to(outs[0].dtype), (shift + torch.log(total)).masked_fill(blind, -torch.inf)


def _of_elements(rows: Tensor) -> Tensor:
    """(B, H, T) as (B, T, H, 1)."""
    return rows.transpose(-1, -2).unsqueeze(-1)


def _check_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"llmsys.merge_attention: {len(outs)} outs and {len(lses)} lses, expected as many of one as of the other, "
            "at least one"
        )
    first = outs[0]
    if first.dtype not in _check.FLOATS:
        raise TypeError(
            f"llmsys.merge_attention: outs[0] is {first.dtype}, expected float32, bfloat16, float16 or float64"
        )
    if first.dim() not in (3, 4):
        raise ValueError(
            f"llmsys.merge_attention: outs[0] has shape {tuple(first.shape)}, expected (B, T, H, E) or (total, H, E)"
        )
    wide = torch.promote_types(first.dtype, torch.float32)
    shape = (*first.shape[:-3], first.shape[-2], first.shape[-3])
    for name, tensors, expected, dtype in (
        ("outs", outs, tuple(first.shape), first.dtype),
        ("lses", lses, shape, wide),
    ):
        for i, tensor in enumerate(tensors):
            if tensor.dtype != dtype:
                raise TypeError(f"llmsys.merge_attention: {name}[{i}] is {tensor.dtype}, expected {dtype}")
            if tuple(tensor.shape) != expected or tensor.device != first.device:
                raise ValueError(
                    f"llmsys.merge_attention: {name}[{i}] has shape {tuple(tensor.shape)} on {tensor.device}, expected "
                    f"{expected} on {first.device}"
                )
