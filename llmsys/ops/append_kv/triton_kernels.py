"""Appending to a cache in Triton: a program writes heads of one new token, of its keys or of its values."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._triton import device_of, load, num_warps, store, to_float32
from llmsys.ops.append_kv.native import cache_strides
from llmsys.ops.attention_decode import cache
from llmsys.ops.rope.native import table_strides, with_whole_rows

TILE = 2048  # elements of k or v
ROUND = tl.constexpr(1.5 * 2**23)  # a sum with it has the nearest integer in its lowest bits


@triton.jit
def magnitude(x):
    """The order of bits: NaN is above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def store_as(pointer, value, scale, mask, INT8: tl.constexpr):
    """`value`, or its code, which is 0 unless `scale` is above 0 and finite."""
    if INT8:
        usable = (scale > 0) & (scale < float("inf"))
        code = tl.div_rn(value, tl.where(usable, scale, 1.0))
        code = tl.where(usable, tl.minimum(tl.maximum(code, -127.0), 127.0), 0.0)
        tl.store(pointer, (code + ROUND).to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
    elif value.dtype == pointer.dtype.element_ty:
        tl.store(pointer, value, mask=mask)
    else:
        store(pointer, value, mask)


@triton.jit
def append_heads(
    x_ptr,
    cache_ptr,
    scale_ptr,
    cos_ptr,
    sin_ptr,
    first_head,
    heads,
    dim,
    half,
    x_head_stride,
    cache_head_stride,
    cache_dim_stride,
    scale_head_stride,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_HEADS heads of a token, whose first `2 · half` elements turn; the pointers are at its rows."""
    INT8: tl.constexpr = scale_ptr is not None
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    inside = head < heads
    x_ptr += head * x_head_stride
    cache_ptr += head * cache_head_stride
    largest = tl.zeros((BLOCK_HEADS, 1), tl.int32)
    if BLOCK_HALF > 0:
        i = tl.arange(0, BLOCK_HALF)[None, :]
        cos, sin = load(cos_ptr + i, i < half), load(sin_ptr + i, i < half)
        turning = inside & (i < half)
        if INTERLEAVED:
            d = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            pairs = load(x_ptr + d, inside & (d < 2 * half))
            a, b = tl.split(pairs.reshape(BLOCK_HEADS, BLOCK_HALF, 2))
        else:
            a, b = load(x_ptr + i, turning), load(x_ptr + half + i, turning)
        first, second = a * cos - b * sin, b * cos + a * sin
        if INT8:
            largest = tl.max(tl.maximum(magnitude(first), magnitude(second)), 1, keep_dims=True)
    if BLOCK_REST > 0:
        e = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        staying = inside & (e < dim)
        rest = tl.load(x_ptr + e, staying, 0.0)
        if INT8:
            rest = to_float32(rest)
            largest = tl.maximum(largest, tl.max(magnitude(rest), 1, keep_dims=True))
    scale = 0.0
    if INT8:
        largest = largest.to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, 127.0)
        tl.store(scale_ptr + head * scale_head_stride, scale, mask=inside)
    if BLOCK_HALF > 0:
        if INTERLEAVED:
            turned = tl.interleave(first, second)
            store_as(cache_ptr + d * cache_dim_stride, turned, scale, inside & (d < 2 * half), INT8)
        else:
            store_as(cache_ptr + i * cache_dim_stride, first, scale, turning, INT8)
            store_as(cache_ptr + (half + i) * cache_dim_stride, second, scale, turning, INT8)
    if BLOCK_REST > 0:
        store_as(cache_ptr + e * cache_dim_stride, rest, scale, staying, INT8)


@triton.jit
def append_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    lengths_ptr,
    block_table_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    heads,
    dim,
    value_dim,
    half,
    blocks,
    block_size,
    max_blocks,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    k_cache_block_stride,
    k_cache_token_stride,
    k_cache_head_stride,
    k_cache_dim_stride,
    v_cache_block_stride,
    v_cache_token_stride,
    v_cache_head_stride,
    v_cache_dim_stride,
    k_scale_block_stride,
    k_scale_token_stride,
    k_scale_head_stride,
    v_scale_block_stride,
    v_scale_token_stride,
    v_scale_head_stride,
    block_table_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE_HEADS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    sequence, token = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
    place = tl.load(lengths_ptr + sequence).to(tl.int64) + token
    # What a GPU holds is not asked before the launch: a token whose place is outside is skipped.
    inside = (place >= 0) & (place // block_size < max_blocks)
    block = sequence
    if block_table_ptr is not None:
        listed = block_table_ptr + sequence * block_table_stride + place // block_size
        block = tl.load(listed, inside, -1).to(tl.int64)
        place = place % block_size
    if inside & (block >= 0) & (block < blocks):
        head = tl.program_id(1).to(tl.int64) * BLOCK_HEADS
        key_programs = tl.cdiv(heads, BLOCK_HEADS)
        if tl.program_id(1) < key_programs:
            if k_scale_ptr is not None:
                k_scale_ptr += block * k_scale_block_stride + place * k_scale_token_stride
            if cos_ptr is not None:
                cos_ptr += sequence * cos_batch_stride + token * cos_token_stride
                sin_ptr += sequence * sin_batch_stride + token * sin_token_stride
            append_heads(
                k_ptr + sequence * k_batch_stride + token * k_token_stride,
                k_cache_ptr + block * k_cache_block_stride + place * k_cache_token_stride,
                *(k_scale_ptr, cos_ptr, sin_ptr, head, heads, dim, half),
                *(k_head_stride, k_cache_head_stride, k_cache_dim_stride, k_scale_head_stride),
                *(INTERLEAVED, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST),
            )
        else:
            if v_scale_ptr is not None:
                v_scale_ptr += block * v_scale_block_stride + place * v_scale_token_stride
            head = (tl.program_id(1) - key_programs).to(tl.int64) * BLOCK_VALUE_HEADS
            append_heads(
                v_ptr + sequence * v_batch_stride + token * v_token_stride,
                v_cache_ptr + block * v_cache_block_stride + place * v_cache_token_stride,
                *(v_scale_ptr, None, None, head, heads, value_dim, 0),
                *(v_head_stride, v_cache_head_stride, v_cache_dim_stride, v_scale_head_stride),
                *(INTERLEAVED, BLOCK_VALUE_HEADS, 0, BLOCK_VALUE),
            )


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
    (batch, tokens, heads, dim), value_dim = k.shape, v.shape[-1]
    cache.check_places("append_kv", k_cache, cache_seqlens, block_table, appended=tokens)
    if batch * tokens * heads == 0:
        return
    k, v, cache_seqlens = with_whole_rows(k), with_whole_rows(v), cache_seqlens.contiguous()
    block_table = None if block_table is None else with_whole_rows(block_table)
    half, angle_strides = 0, (0, 0, 0, 0)
    if cos is not None and sin is not None:
        cos, sin = with_whole_rows(cos), with_whole_rows(sin)
        half, angle_strides = cos.shape[-1], (*table_strides(cos), *table_strides(sin))
    block_half = triton.next_power_of_2(half) if half else 0
    block_rest = triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0
    block_value = triton.next_power_of_2(max(value_dim, 1))
    key_size = triton.next_power_of_2(max(2 * block_half + block_rest, 1))
    key_heads, value_heads = _heads(heads, key_size), _heads(heads, block_value)
    programs = triton.cdiv(heads, key_heads) + triton.cdiv(heads, value_heads)
    strides = [*k.stride()[:-1], *v.stride()[:-1], *cache_strides(k_cache), *cache_strides(v_cache)]
    for scale in (k_scale, v_scale):
        strides += (0, 0, 0) if scale is None else scale.stride()
    with device_of(k):
        append_kernel[(batch * tokens, programs)](
            *(k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, cos, sin),
            *(tokens, heads, dim, value_dim, half, *k_cache.shape[:2]),
            *(1 if block_table is None else block_table.shape[1], *strides),
            *(0 if block_table is None else block_table.stride(0), *angle_strides),
            *(interleaved, key_heads, block_half, block_rest, value_heads, block_value),
            num_warps=num_warps(max(key_heads * key_size, value_heads * block_value)),
            enable_fp_fusion=False,  # the same bits as everywhere
        )


def _heads(heads: int, size: int) -> int:
    """How many heads of `size` elements a program takes."""
    return min(triton.next_power_of_2(heads), max(TILE // size, 1))
