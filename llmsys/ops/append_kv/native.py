"""Appending to a cache on native kernels."""

from __future__ import annotations

from torch import Tensor

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl
from llmsys.ops.attention_decode import cache
from llmsys.ops.rope.native import NOTHING, table_strides, with_whole_rows


def implementation(kernels: Kernels) -> Impl:
    """Appending to a cache on `kernels`."""
    launch = kernels.launch("append_kv")

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
        batch, tokens, heads, dim = k.shape
        cache.check_places("append_kv", k_cache, cache_seqlens, block_table, appended=tokens)
        k, v, cache_seqlens = with_whole_rows(k), with_whole_rows(v), cache_seqlens.contiguous()
        table, table_stride, max_blocks = 0, 0, 1
        if block_table is not None:
            block_table = with_whole_rows(block_table)
            table, table_stride, max_blocks = block_table.data_ptr(), block_table.stride(0), block_table.shape[1]
        rotary_dim, angles, angle_strides = 0, (0, 0), (0, 0)
        if cos is not None and sin is not None:
            cos, sin = with_whole_rows(cos.float()), with_whole_rows(sin.float())
            if cos.stride() != sin.stride():
                cos, sin = cos.contiguous(), sin.contiguous()
            rotary_dim, angle_strides = 2 * cos.shape[-1], table_strides(cos)
            angles = cos.data_ptr(), sin.data_ptr()
        scales, scale_strides = (0, 0), (NOTHING, NOTHING)
        if k_scale is not None and v_scale is not None:
            scales, scale_strides = (k_scale.data_ptr(), v_scale.data_ptr()), (k_scale.stride(), v_scale.stride())
        launch(
            *(k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), *scales),
            *(cache_seqlens.data_ptr(), table, *angles, batch, tokens, heads, dim, v.shape[-1], rotary_dim),
            *(*k_cache.shape[:2], max_blocks, *k.stride()[:-1], *v.stride()[:-1]),
            *(*cache_strides(k_cache), *cache_strides(v_cache), *scale_strides[0], *scale_strides[1]),
            *(table_stride, *angle_strides, interleaved, k_scale is not None, DTYPES[k.dtype]),
        )

    return Impl(kernels.name, forward, None, kernels.why_not, (kernels.device,))


def cache_strides(cache: Tensor) -> tuple[int, ...]:
    """The strides of `cache`, whose last one is 1 where there is one element."""
    return cache.stride() if cache.shape[-1] != 1 else (*cache.stride()[:-1], 1)


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
