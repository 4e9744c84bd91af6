"""Attention to a cache in plain PyTorch: that of `llmsys.attention`, with a bias that hides what is not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsys.ops.attention import reference as attention
from llmsys.ops.attention_decode import cache
from llmsys.ops.attention_decode.arguments import Arguments


def forward(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(y, lse): see `llmsys.attention_decode`."""
    given = Arguments(*args)
    q, cache_seqlens, block_table = given.q, given.cache_seqlens, given.block_table
    cache.check_places("attention_decode", given.k_cache, cache_seqlens, block_table)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (
        _read(codes, scales, cache_seqlens, block_table, wide)
        for codes, scales in ((given.k_cache, given.k_scale), (given.v_cache, given.v_scale))
    )
    t, s = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
    place = (t + (cache_seqlens.unsqueeze(1) - q.shape[1])).unsqueeze(-1)  # (B, T, 1)
    seen = (s < cache_seqlens.view(-1, 1, 1)).expand(-1, q.shape[1], -1)
    if given.window_left >= 0:
        seen = seen & (s >= place - given.window_left)
    if given.window_right >= 0:
        seen = seen & (s <= place + given.window_right)
    bias = torch.zeros(seen.shape, dtype=wide, device=q.device).unsqueeze(1)
    if given.alibi_slopes is not None:
        bias = -given.alibi_slopes.to(wide)[:, :, None, None] * (place - s).abs().unsqueeze(1)
    bias = bias.masked_fill(~seen.unsqueeze(1), -torch.inf)
    nothing = (None,) * 4
    return attention.forward(
        *(q, k, v, bias, given.sinks, *nothing, 64, -1, -1, given.scale, given.softcap, 0.0, 0),
        out=out,
    )


def _read(
    codes: Tensor, scales: Tensor | None, cache_seqlens: Tensor, block_table: Tensor | None, wide: torch.dtype
) -> Tensor:
    """Keys or values as (B, S, K, ·) in the dtype that is computed in; 0 from the sequence's length on."""
    values = cache.gathered(codes, block_table).to(wide)
    if scales is not None:
        values = values * cache.gathered(scales, block_table).to(wide).unsqueeze(-1)
    counts = torch.arange(values.shape[1], device=values.device) < cache_seqlens.unsqueeze(1)
    return values.where(counts[:, :, None, None], 0.0)
