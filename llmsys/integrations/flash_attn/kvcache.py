"""A cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.integrations.flash_attn.options import window
from llmsys.ops.append_kv import append_kv
from llmsys.ops.attention_decode import attention_decode
from llmsys.ops.rope import rope

NAME = "llmsys.integrations.flash_attn.flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, which new keys and values are written into before, in place.

    The new ones come behind the first cache_seqlens[b] of each sequence, rotated where tables are given: the token t
    by their row cache_seqlens[b] + t. The query t is rotated by the same row if `causal` or within a window, else by
    row cache_seqlens[b]. All that is in the cache then counts; causal order and windows as in `flash_attn_func`.

    Shapes     q (batch, seqlen_q, nheads, headdim); k_cache and v_cache (batch_cache, seqlen_cache, nheads_k, headdim),
               or with block_table int32 (batch, blocks of a sequence) (num_blocks, page_block_size, nheads_k, headdim);
               k and v (batch, seqlen_new, nheads_k, headdim); rotary_cos and rotary_sin (seqlen_ro, rotary_dim / 2);
               cache_seqlens int or int32 (batch,), by default the whole cache; cache_batch_idx int32 (batch,), the
               row of the cache that each sequence has; cache_leftpad int32 (batch,), where it starts there, which
               cache_seqlens counts and rows of the tables do not
               → out (batch, seqlen_q, nheads, headdim); with return_softmax_lse (out, softmax_lse), softmax_lse
               (batch, nheads, seqlen_q) float32
    Gradient   none
    Cost       with cache_leftpad a page for each token, else as `llmsys.attention_decode`; num_splits changes nothing
    Errors     ValueError or TypeError, from here, from `llmsys.append_kv` or from `llmsys.attention_decode`, if the
               arguments do not fit as above, and for block_table with cache_batch_idx or cache_leftpad
    """
    lengths = _lengths(q, k_cache, k, cache_seqlens, block_table)
    window_size = window(window_size)
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        other = "cache_leftpad" if cache_batch_idx is None else "cache_batch_idx"
        raise ValueError(f"{NAME}: block_table and {other} are given, expected one of them")
    if (k is None) != (v is None):
        raise ValueError(f"{NAME}: {'v' if k is None else 'k'} is given alone, expected both of k and v, or none")
    if cache_leftpad is not None:
        k_cache, v_cache, block_table = _pages_of_one(k_cache, v_cache, cache_batch_idx, cache_leftpad)
        lengths = lengths - cache_leftpad
    elif cache_batch_idx is not None:
        block_table = cache_batch_idx.unsqueeze(1)  # each row of the cache is a page
    elif block_table is None:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    cos: Tensor | None = None
    sin: Tensor | None = None
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None or k is None:
            raise ValueError(
                f"{NAME}: rotary_cos is {_given(rotary_cos)}, rotary_sin {_given(rotary_sin)} and k {_given(k)}, "
                "expected all three, or none of the tables"
            )
        steps = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
        rows = lengths.unsqueeze(1) + steps
        of_q = rows if causal or window_size != (-1, -1) else rows[:, :1].expand_as(rows)
        q = rope(q, *_rows(rotary_cos, rotary_sin, of_q[:, : q.shape[1]]), interleaved=rotary_interleaved)
        cos, sin = _rows(rotary_cos, rotary_sin, rows[:, : k.shape[1]])
    if k is not None and v is not None:
        append_kv(
            *(k_cache, v_cache, k, v, lengths),
            block_table=block_table,
            cos=cos,
            sin=sin,
            interleaved=rotary_interleaved,
        )
        lengths = lengths + k.shape[1]
    return attention_decode(
        *(q, k_cache, v_cache),
        cache_seqlens=lengths,
        block_table=block_table,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_softmax_lse,
    )


def _lengths(
    q: Tensor, k_cache: Tensor, k: Tensor | None, cache_seqlens: int | Tensor | None, block_table: Tensor | None
) -> Tensor:
    """cache_seqlens as a tensor."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{NAME}: cache_seqlens is None, expected where k and v go: an int or int32 (batch,)")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _pages_of_one(
    k_cache: Tensor, v_cache: Tensor, cache_batch_idx: Tensor | None, cache_leftpad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The caches as pages of one token, and the pages of each sequence from its start on."""
    size = k_cache.shape[1]
    pages = [_flat(name, cache).unsqueeze(1) for name, cache in (("k_cache", k_cache), ("v_cache", v_cache))]
    rows = torch.arange(len(cache_leftpad), device=k_cache.device) if cache_batch_idx is None else cache_batch_idx
    places = (cache_leftpad.unsqueeze(1) + torch.arange(size, device=k_cache.device)).clamp(max=size - 1)
    return pages[0], pages[1], (rows.unsqueeze(1) * size + places).int()


def _flat(name: str, cache: Tensor) -> Tensor:
    if cache.stride(0) != cache.shape[1] * cache.stride(1):
        raise ValueError(
            f"{NAME}: {name} has strides {cache.stride()} for shape {tuple(cache.shape)}, expected with cache_leftpad "
            "one row right behind the other; .contiguous() makes it so, in a copy"
        )
    return cache.flatten(0, 1)


def _rows(cos: Tensor, sin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    if (
        rows.is_cpu
        and rows.numel()
        and not torch.compiler.is_compiling()
        and int(rows.max()) >= min(len(cos), len(sin))
    ):
        raise ValueError(
            f"{NAME}: rotary_cos and rotary_sin have {len(cos)} and {len(sin)} rows, expected at least "
            f"{int(rows.max()) + 1}: one for each place in the cache"
        )
    return cos[rows.long()], sin[rows.long()]


def _given(tensor: Tensor | None) -> str:
    return "None" if tensor is None else "given"
