"""Appending to a cache in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops.attention_decode import cache
from llmsys.ops.rope import reference as rope

LARGEST = 127


def forward(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    """See `llmsys.append_kv`."""
    tokens = k.shape[1]
    cache.check_places("append_kv", k_cache, cache_seqlens, block_table, appended=tokens)
    place = cache_seqlens.long().unsqueeze(1) + torch.arange(tokens, device=k.device)  # (B, T)
    if block_table is None:
        at = torch.arange(k.shape[0], device=k.device).unsqueeze(1).expand_as(place), place
    else:
        size = k_cache.shape[1]
        at = block_table.long().gather(1, place // size), place % size
    if cos is not None and sin is not None:
        k = rope.forward(k.to(torch.promote_types(k.dtype, torch.float32)), cos, sin, interleaved)
    for values, codes, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scales is None:
            codes.index_put_(at, values.to(codes.dtype))
        else:
            quantised, factors = quantise(values)
            codes.index_put_(at, quantised)
            scales.index_put_(at, factors)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale for each row, whose largest element has the code 127 or −127. A row with NaN or infinity
    has that as its scale, and codes 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(-1) if x.shape[-1] else wide.sum(-1)) / LARGEST  # amax of nothing is an error
    codes = torch.round(wide / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    usable = (scale > 0) & scale.isfinite()
    return codes.where(usable.unsqueeze(-1), 0.0).to(torch.int8), scale
