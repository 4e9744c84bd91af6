"""Attention to a cache in Triton: a program has the query rows of a key head and goes over a split of its keys; then a
program for each row merges what those left.

Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops import _triton
from llmsys.ops._triton import INTERPRETED, device_of, load, rounded, store, to_float32
from llmsys.ops.attention_decode import cache
from llmsys.ops.attention_decode.arguments import Arguments
from llmsys.ops.cross_entropy.triton_kernels import sloped_cap

LOG2_E = tl.constexpr(math.log2(math.e))
SPLIT_KEYS = 256
MAX_SPLITS = 64  # of a cache: what they leave behind takes memory for all there is room for
MERGED = 16  # splits at a time
BLOCK_ROWS = 16  # the fewest that tensor cores take
# (keys, warps) for head dims up to 128 and up to 256, by what q or the cache is: within 48 KiB of shared memory, and
# within 128 registers but for the widest float32 on AMD.
TILES = {
    "sm_80": {"16-bit": ((64, 4), (32, 8)), "int8": ((32, 8), (32, 8)), "float32": ((32, 8), (16, 8))},
    "gfx942": {"16-bit": ((32, 8), (16, 4)), "int8": ((16, 8), (16, 8)), "float32": ((16, 8), (16, 8))},
}


@triton.jit
def product(a, b, sums=None):
    """sums + a b, of 16-bit tiles on tensor cores."""
    if INTERPRETED:  # whose dot would multiply the bits of bfloat16
        a, b = to_float32(a), to_float32(b)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def finite_or_zero(x):
    """What scores are shifted by: e^infinity, not NaN, is what becomes of an infinite one."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def seen_by(length, token, tokens, window_left, window_right):
    """(first, end) of the keys that query `token` sees, and its place."""
    place = length - tokens + token
    first = tl.where(window_left < 0, 0, tl.maximum(place - window_left, 0))
    end = tl.where(window_right < 0, length, tl.minimum(place + window_right + 1, length))
    return first, end, place


@triton.jit
def split_kernel(
    q_ptr,
    q_b_stride,
    q_t_stride,
    q_h_stride,
    k_ptr,
    k_p_stride,
    k_s_stride,
    k_h_stride,
    v_ptr,
    v_p_stride,
    v_s_stride,
    v_h_stride,
    k_scale_ptr,
    k_scale_p_stride,
    k_scale_s_stride,
    k_scale_h_stride,
    v_scale_ptr,
    v_scale_p_stride,
    v_scale_s_stride,
    v_scale_h_stride,
    lengths_ptr,
    table_ptr,
    table_stride,
    alibi_ptr,
    alibi_stride,
    parts_ptr,
    values_ptr,
    page_size,
    kv_heads,
    tokens,
    rows,
    splits,
    window_left,
    window_right,
    scale,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    key_head, rest = (rest % kv_heads).to(tl.int64), rest // kv_heads
    split, b = rest % splits, (rest // splits).to(tl.int64)
    length = tl.load(lengths_ptr + b)
    lowest, _, _ = seen_by(length, 0, tokens, window_left, window_right)
    _, highest_end, _ = seen_by(length, tokens - 1, tokens, window_left, window_right)
    begin, stop = tl.maximum(split * SPLIT, lowest), tl.minimum((split + 1) * SPLIT, highest_end)
    if begin < stop:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        head, token = key_head * (rows // tokens) + row // tokens, row % tokens
        first, end, place = seen_by(length, token, tokens, window_left, window_right)
        end = tl.minimum(end, stop)
        d, e = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
        q_row = b * q_b_stride + token * q_t_stride + head * q_h_stride
        q = tl.load(q_ptr + q_row[:, None] + d[None, :], (row < rows)[:, None] & (d < DIM)[None, :], 0.0)
        if BLOCK_DIM < DIM:
            late = BLOCK_DIM + d
            q_late = tl.load(q_ptr + q_row[:, None] + late[None, :], (row < rows)[:, None] & (late < DIM)[None, :], 0.0)
        slope = 0.0
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + b * alibi_stride + head, row < rows, 0.0)[:, None]
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32)
        for start in range(begin, stop, BLOCK_N):
            s = start + tl.arange(0, BLOCK_N)
            inside = s < stop
            page, at = b + s * 0, s
            if table_ptr is not None:
                page = tl.load(table_ptr + b * table_stride + s // page_size, inside, 0).to(tl.int64)
                at = s % page_size
            k_row = page * k_p_stride + at * k_s_stride + key_head * k_h_stride
            k = tl.load(k_ptr + k_row[:, None] + d[None, :], inside[:, None] & (d < DIM)[None, :], 0)
            if k_scale_ptr is not None:
                k = rounded(k.to(tl.float32), q.dtype)  # every code is a bfloat16
            z = product(q, tl.trans(k))
            if BLOCK_DIM < DIM:
                k_late = tl.load(k_ptr + k_row[:, None] + late[None, :], inside[:, None] & (late < DIM)[None, :], 0)
                z = tl.fma(product(q_late, tl.trans(k_late)), 1.0, z)  # of a `+` Triton would make one sum of products
            z *= scale
            if k_scale_ptr is not None:
                k_at = page * k_scale_p_stride + at * k_scale_s_stride + key_head * k_scale_h_stride
                z *= tl.load(k_scale_ptr + k_at, inside, 0.0)[None, :]
            if SOFTCAP != 0.0:
                z, slope_of_cap = sloped_cap(z, SOFTCAP)
            if alibi_ptr is not None:
                z -= slope * tl.abs(place[:, None] - s[None, :]).to(tl.float32)
            z = tl.where((s[None, :] >= first[:, None]) & (s[None, :] < end[:, None]), z, float("-inf"))
            higher = tl.maximum(highest, tl.max(z, 1))
            shift = finite_or_zero(higher)
            p, shrink = tl.exp2((z - shift[:, None]) * LOG2_E), tl.exp2((highest - shift) * LOG2_E)
            total = total * shrink + tl.sum(p, 1)
            v_row = page * v_p_stride + at * v_s_stride + key_head * v_h_stride
            v = tl.load(v_ptr + v_row[:, None] + e[None, :], inside[:, None] & (e < VALUE_DIM)[None, :], 0)
            if v_scale_ptr is not None:
                v_at = page * v_scale_p_stride + at * v_scale_s_stride + key_head * v_scale_h_stride
                v = rounded(v.to(tl.float32) * tl.load(v_scale_ptr + v_at, inside, 0.0)[:, None], q.dtype)
            sums = product(rounded(p, v.dtype), v, sums * shrink[:, None])
            highest = higher
        part = ((b * kv_heads + key_head) * splits + split) * rows + row
        tl.store(parts_ptr + 2 * part, highest, row < rows)
        tl.store(parts_ptr + 2 * part + 1, total, row < rows)
        to = values_ptr + part[:, None] * VALUE_DIM + e[None, :]
        tl.store(to, sums, (row < rows)[:, None] & (e < VALUE_DIM)[None, :])


@triton.jit
def merge_kernel(
    parts_ptr,
    values_ptr,
    sinks_ptr,
    lengths_ptr,
    y_ptr,
    lse_ptr,
    heads,
    kv_heads,
    tokens,
    splits,
    window_left,
    window_right,
    SPLIT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    MERGED: tl.constexpr,
):
    token, rest = tl.program_id(0) % tokens, tl.program_id(0) // tokens
    head, b = rest % heads, (rest // heads).to(tl.int64)
    group = heads // kv_heads
    rows, row = group * tokens, head % group * tokens + token
    length = tl.load(lengths_ptr + b)
    lowest, _, _ = seen_by(length, 0, tokens, window_left, window_right)
    _, highest_end, _ = seen_by(length, tokens - 1, tokens, window_left, window_right)
    begin, stop = lowest // SPLIT, tl.cdiv(highest_end, SPLIT)
    stop = tl.where(highest_end > lowest, stop, begin)
    first_part = (b * kv_heads + head // group) * splits * rows + row
    e = tl.arange(0, BLOCK_VALUE)
    highest = float("-inf")
    if sinks_ptr is not None:
        highest = tl.load(sinks_ptr + head).to(tl.float32)
    for start in range(begin, stop, MERGED):
        split = start + tl.arange(0, MERGED)
        m = tl.load(parts_ptr + 2 * (first_part + split * rows), split < stop, float("-inf"))
        highest = tl.maximum(highest, tl.max(m, 0))
    shift = finite_or_zero(highest)
    total = 0.0
    if sinks_ptr is not None:
        total = tl.exp2((tl.load(sinks_ptr + head).to(tl.float32) - shift) * LOG2_E)
    sums = tl.zeros((BLOCK_VALUE,), tl.float32)
    for start in range(begin, stop, MERGED):
        split = start + tl.arange(0, MERGED)
        part = first_part + split * rows
        weight = tl.exp2((tl.load(parts_ptr + 2 * part, split < stop, float("-inf")) - shift) * LOG2_E)
        total += tl.sum(weight * load(parts_ptr + 2 * part + 1, split < stop), 0)
        counts = ((split < stop) & (weight != 0.0))[:, None] & (e < VALUE_DIM)[None, :]
        values = load(values_ptr + part[:, None] * VALUE_DIM + e[None, :], counts)
        sums += tl.sum(weight[:, None] * values, 0)
    seen = tl.where(total == 0.0, 1.0, total)
    to = y_ptr + ((b * tokens + token) * heads + head) * VALUE_DIM + e
    store(to, sums * (1.0 / seen), e < VALUE_DIM)
    lse = tl.where(total == 0.0, float("-inf"), shift + tl.log(seen))
    tl.store(lse_ptr + (b * heads + head) * tokens + token, lse)


def forward(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(y, lse): see `llmsys.attention_decode`."""
    given = Arguments(*args)
    q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes, sinks = given[:9]
    cache.check_places("attention_decode", k_cache, cache_seqlens, block_table)
    batch, tokens, heads, dim = q.shape
    page_size, kv_heads, value_dim = v_cache.shape[1:]
    y, lse = out or (
        torch.empty((batch, tokens, heads, value_dim), dtype=q.dtype, device=q.device),
        torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device),
    )
    if lse.numel() == 0:
        return y, lse
    room = cache.capacity(k_cache, block_table)
    split = max(SPLIT_KEYS, triton.next_power_of_2(triton.cdiv(room, MAX_SPLITS)))
    splits, rows = max(triton.cdiv(room, split), 1), heads // kv_heads * tokens
    parts = torch.empty((batch, kv_heads, splits, rows, 2), dtype=torch.float32, device=q.device)
    values = torch.empty((batch, kv_heads, splits, rows, value_dim), dtype=torch.float32, device=q.device)
    cache_seqlens = cache_seqlens.contiguous()
    block_dim, block_value = (max(triton.next_power_of_2(size), 16) for size in (dim, value_dim))
    wide = max(block_dim, block_value) > 128
    if q.dtype == torch.float32:  # a sum of 256 products, one after another, would round away too much
        block_dim = min(block_dim, 128)
    kind = "float32" if q.dtype == torch.float32 else "16-bit" if k_scale is None else "int8"
    block_n, warps = TILES["gfx942" if _triton.architecture(q.device) == "gfx942" else "sm_80"][kind][wide]
    stages = 1 if q.dtype == torch.float32 else 2
    table, table_stride = _rows(block_table)
    alibi, alibi_stride = _rows(None if alibi_slopes is None else alibi_slopes.float())
    with device_of(q):
        split_kernel[(triton.cdiv(rows, BLOCK_ROWS) * kv_heads * splits * batch,)](
            *(*_placed(q), *_placed(k_cache), *_placed(v_cache), *_scales(k_scale), *_scales(v_scale)),
            *(cache_seqlens, table, table_stride, alibi, alibi_stride, parts, values),
            *(page_size, kv_heads, tokens, rows, splits, given.window_left, given.window_right, given.scale),
            *(given.softcap, split, dim, value_dim, block_dim, block_value, BLOCK_ROWS, block_n),
            num_warps=warps,
            num_stages=stages,
        )
        merge_kernel[(batch * heads * tokens,)](
            *(parts, values, None if sinks is None else sinks.contiguous(), cache_seqlens, y, lse),
            *(heads, kv_heads, tokens, splits, given.window_left, given.window_right),
            *(split, value_dim, block_value, MERGED),
            num_warps=4,
        )
    return y, lse


def _placed(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` and the strides of its rows; a copy where rows have gaps."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def _scales(scale: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    return (None, 0, 0, 0) if scale is None else (scale, scale.stride(0), scale.stride(1), scale.stride(2))


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """`x` and the stride of its rows, which have no gaps."""
    if x is None:
        return None, 0
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x, x.stride(0)
