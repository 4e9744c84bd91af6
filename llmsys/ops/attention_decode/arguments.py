"""The arguments of attention_decode by name."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """Those of the op, in the order of its schema. q (B, T, H, D), caches (B, S, K, D) and (B, S, K, E), or paged."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor  # (B,)
    block_table: Tensor | None  # (B, max_blocks) of a paged cache, whose tensors are (num_blocks, block_size, K, ·)
    k_scale: Tensor | None  # of an int8 cache: its shape, less the last dimension
    v_scale: Tensor | None
    alibi_slopes: Tensor | None  # (B, H)
    sinks: Tensor | None  # (H,)
    window_left: int  # keys seen before a query's own place, -1 for all
    window_right: int
    scale: float
    softcap: float  # 0 for none
