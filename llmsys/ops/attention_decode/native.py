"""Attention to a cache on native kernels. There is one for the CPU only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl
from llmsys.ops.attention_decode import cache
from llmsys.ops.attention_decode.arguments import Arguments

NO_STRIDES = 0, 0, 0  # of what is not there


def implementation(kernels: Kernels) -> Impl:
    """Attention to a cache on `kernels`."""
    launch = kernels.launch("attention_decode")

    def forward(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        given = Arguments(*args)
        cache.check_places("attention_decode", given.k_cache, given.cache_seqlens, given.block_table)
        q, k_cache, v_cache = (with_whole_rows(x) for x in given[:3])
        cache_seqlens, k_scale, v_scale = given.cache_seqlens.contiguous(), given.k_scale, given.v_scale
        block_table, alibi_slopes, sinks = given.block_table, given.alibi_slopes, given.sinks
        if block_table is not None:
            block_table = with_whole_rows(block_table)
        if alibi_slopes is not None:
            alibi_slopes = with_whole_rows(alibi_slopes.float())
        if sinks is not None:
            sinks = sinks.float().contiguous()
        batch, tokens, heads, dim = q.shape
        block_size, kv_heads, value_dim = v_cache.shape[1:]
        y, lse = out or (
            torch.empty((batch, tokens, heads, value_dim), dtype=q.dtype),
            torch.empty((batch, heads, tokens), dtype=torch.float32),
        )
        optional = [0 if x is None else x.data_ptr() for x in (block_table, alibi_slopes, sinks)]
        scales = [0 if x is None else x.data_ptr() for x in (k_scale, v_scale)]
        launch(
            *(
                q.data_ptr(),
                k_cache.data_ptr(),
                v_cache.data_ptr(),
                *scales,
                cache_seqlens.data_ptr(),
                *optional,
                y.data_ptr(),
                lse.data_ptr(),
            ),
            *(batch, tokens, heads, kv_heads, dim, value_dim, block_size),
            *(*q.stride()[:-1], *k_cache.stride()[:-1], *v_cache.stride()[:-1]),
            *(NO_STRIDES if k_scale is None else k_scale.stride()),
            *(NO_STRIDES if v_scale is None else v_scale.stride()),
            *(
                0 if block_table is None else block_table.stride(0),
                0 if alibi_slopes is None else alibi_slopes.stride(0),
            ),
            *(given.window_left, given.window_right, given.scale, given.softcap, k_scale is not None, DTYPES[q.dtype]),
        )
        return y, lse

    return Impl(kernels.name, forward, None, kernels.why_not, (kernels.device,))


def with_whole_rows(x: Tensor) -> Tensor:
    """`x`, copied unless the elements of its last dimension lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


CPU: Impl = implementation(_native.CPU)
