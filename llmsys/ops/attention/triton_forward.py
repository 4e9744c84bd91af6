"""The forward of attention in Triton: a program has a tile of queries, and goes over the tiles of keys that they see.

Dao 2023, arXiv:2307.08691, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._triton import device_of, rounded
from llmsys.ops.attention.arguments import Arguments
from llmsys.ops.attention.triton_scores import (
    BLOCK_MASK,
    LOG2_E,
    kept,
    lets_through,
    load_tile,
    options_of,
    placed,
    product,
    row_facts,
    row_products,
    scored,
    shared,
    store_tile,
    tiles_between,
    widths,
)
from llmsys.ops.attention.triton_tiles import tile_sizes


@triton.jit
def attend(
    state,
    q,
    q_place,
    keys,
    values,
    t0,
    s0,
    facts,
    options,
    UNITS: tl.constexpr,
    CHANGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(sums of values, highest score, sum of exponentials) after the keys from s0 on."""
    sums, highest, total = state
    k_ptr, k_stride = keys
    v_ptr, v_stride = values
    i, j, remaining = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), options[6][1] - s0
    k_ptr += tl.cast(s0, tl.int64) * k_stride
    v_ptr += tl.cast(s0, tl.int64) * v_stride
    k = load_tile(k_ptr, k_stride, remaining, DIM, BLOCK_DIM, BLOCK_N, MASKED)
    products = row_products(q, q_place, k, (k_ptr, k_stride, remaining), DIM, BLOCK_DIM, BLOCK_M, BLOCK_N)
    z, _ = scored(products, t0, i[:, None], s0, j[None, :], facts, options, CHANGES, SOFTCAP, UNITS, MASKED)
    higher = tl.maximum(highest, tl.max(z, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # of queries that have seen nothing yet
    log2_unit = options[1][1] if UNITS == "products" else LOG2_E
    p, shrink = tl.exp2((z - shift[:, None]) * log2_unit), tl.exp2((highest - shift) * log2_unit)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(t0 + i, s0, options, BLOCK_N), p, 0.0)
    v = load_tile(v_ptr, v_stride, remaining, VALUE_DIM, BLOCK_VALUE, BLOCK_N, MASKED)
    return product(rounded(p, v.dtype), v, sums * shrink[:, None]), higher, total


@triton.jit(do_not_specialize=["threshold", "seed_low", "seed_high"])
def forward_kernel(
    q_ptr,
    q_b_stride,
    q_t_stride,
    q_h_stride,
    k_ptr,
    k_b_stride,
    k_s_stride,
    k_h_stride,
    v_ptr,
    v_b_stride,
    v_s_stride,
    v_h_stride,
    sinks_ptr,
    y_ptr,
    lse_ptr,
    UNITS: tl.constexpr,
    rows_ptr,
    alibi_ptr,
    bias_ptr,
    bias_b_stride,
    bias_h_stride,
    bias_t_stride,
    bias_s_stride,
    mask_ptr,
    mask_b_stride,
    mask_h_stride,
    mask_t_stride,
    mask_s_stride,
    block_size,
    num_queries,
    num_keys,
    heads,
    group,
    scale,
    scale_log2,
    threshold,
    kept_scale,
    seed_low,
    seed_high,
    CHANGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last queries see most where attention is causal: they come first, of all heads.
    tiles = tl.cdiv(num_queries, BLOCK_M)
    all_heads = tl.num_programs(0) // tiles
    head = tl.program_id(0) % all_heads
    t0 = (tiles - 1 - tl.program_id(0) // all_heads) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    key_head = h // group
    q_ptr += b * q_b_stride + h * q_h_stride + tl.cast(t0, tl.int64) * q_t_stride
    k_ptr += b * k_b_stride + key_head * k_h_stride
    v_ptr += b * v_b_stride + key_head * v_h_stride
    options = options_of(
        *(head, heads, (scale, scale_log2)),
        *(bias_ptr, (bias_b_stride, bias_h_stride, bias_t_stride, bias_s_stride)),
        *(mask_ptr, (mask_b_stride, mask_h_stride, mask_t_stride, mask_s_stride), block_size),
        *((threshold, kept_scale, seed_low, seed_high), (num_queries, num_keys), CHANGES),
    )
    t = t0 + tl.arange(0, BLOCK_M)
    facts = row_facts(rows_ptr, alibi_ptr, t[:, None], num_queries, head, heads, CHANGES)
    q_place = q_ptr, q_t_stride, num_queries - t0
    q = load_tile(*q_place, DIM, BLOCK_DIM, BLOCK_M, True)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    state = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32), highest, total

    keys, values = (k_ptr, k_s_stride), (v_ptr, v_s_stride)
    begin, full_begin, full_end, stop = tiles_between(rows_ptr, t0, num_queries, CHANGES, BLOCK_M, BLOCK_N)
    if BLOCK_MASK & CHANGES == 0:
        for tile in range(full_begin, full_end):
            state = attend(
                *(state, q, q_place, keys, values, t0, tile * BLOCK_N, facts, options),
                *(UNITS, CHANGES, SOFTCAP, DROPOUT, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_N, False),
            )
    full = full_end - full_begin
    for tile in range(begin, stop - full):
        tile += tl.where(tile >= full_begin, full, 0)
        if BLOCK_MASK & CHANGES == 0 or lets_through(t0, tile * BLOCK_N, options, BLOCK_M, BLOCK_N):
            state = attend(
                *(state, q, q_place, keys, values, t0, tile * BLOCK_N, facts, options),
                *(UNITS, CHANGES, SOFTCAP, DROPOUT, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_N, True),
            )

    sums, highest, total = state
    if UNITS == "products":
        highest *= scale
    weight = tl.zeros_like(total) + kept_scale
    if sinks_ptr is not None:  # a key without a value
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        higher = tl.maximum(highest, sink)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2((highest - shift) * LOG2_E)
        weight *= shrink
        total, highest = total * shrink + tl.exp2((sink - shift) * LOG2_E), higher
    seen = tl.where(total == 0.0, 1.0, total)
    weight = tl.div_rn(weight, seen)
    y = sums * weight[:, None]
    store_tile(y_ptr, b * num_queries + t0, heads, h, num_queries - t0, y, VALUE_DIM, BLOCK_VALUE, BLOCK_M)
    lse = highest + tl.log(seen)  # of a query that sees nothing -inf
    tl.store(lse_ptr + tl.cast(head, tl.int64) * num_queries + t, lse, mask=t < num_queries)


def forward(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(y, lse): see `llmsys.attention`."""
    given = Arguments(*args)
    q, v = given.q, given.v
    (batch, queries, heads, dim), value_dim = q.shape, v.shape[-1]
    if out is None:
        y = torch.empty((batch, queries, heads, value_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    else:
        y, lse = out
    if lse.numel() == 0:
        return y, lse
    dims = widths(dim, value_dim)
    block_m, block_n, warps, stages = tile_sizes("forward", given, max(dims))
    sinks = None if given.sinks is None else given.sinks.contiguous()
    # Scores that are rounded as the backward rounds them, so that lse fits them, where all else is as fine.
    plain = (
        q.dtype != torch.float32
        and given.scale > 0
        and given.softcap == 0
        and given.bias is None
        and given.alibi_slopes is None
    )
    with device_of(q):
        forward_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
            *(
                *placed(q),
                *placed(given.k),
                *placed(v),
                sinks,
                y,
                lse,
                "products" if plain else "natural",
                *shared(given),
            ),
            *(*dims, block_m, block_n),
            num_warps=warps,
            num_stages=stages,
        )
    return y, lse
