"""The backward of attention in Triton: probabilities are computed again, from lse.

A program that has a tile of keys goes over the queries that see them, of every query head of its group, and sums dk and
dv in registers; one that has a tile of queries goes over keys and sums dq. Each sum has one order.
Over 400 lines, of which 150 are the arguments that three kernels share: Triton has no other way to take them.

Source     Dao 2023, arXiv:2307.08691, algorithm 2
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._triton import contiguous_like, device_of, load, rounded, store
from llmsys.ops.attention import reference
from llmsys.ops.attention.arguments import Arguments
from llmsys.ops.attention.bounds import column_bounds
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
def delta_kernel(
    dy_ptr,
    dy_b_stride,
    dy_t_stride,
    dy_h_stride,
    y_ptr,
    y_b_stride,
    y_t_stride,
    y_h_stride,
    dlse_ptr,
    delta_ptr,
    num_queries,
    heads,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = Σ dy · y - dlse, of each query: see `reference.delta`."""
    tiles = tl.cdiv(num_queries, BLOCK_M)
    head, t0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    b, h = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    i, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_VALUE)[None, :]
    mask = (t0 + i < num_queries)[:, None] & (col < VALUE_DIM)
    dy_ptr += b * dy_b_stride + h * dy_h_stride + tl.cast(t0, tl.int64) * dy_t_stride
    y_ptr += b * y_b_stride + h * y_h_stride + tl.cast(t0, tl.int64) * y_t_stride
    dy = load(dy_ptr + i[:, None] * dy_t_stride + col, mask)
    delta = tl.sum(dy * load(y_ptr + i[:, None] * y_t_stride + col, mask), 1)
    row = tl.cast(head, tl.int64) * num_queries + t0 + i
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=t0 + i < num_queries, other=0.0)
    tl.store(delta_ptr + row, delta, mask=t0 + i < num_queries)


@triton.jit
def load_rows(lse_ptr, delta_ptr, head, t, num_queries, UNITS: tl.constexpr):
    """lse in `UNITS`, inf for queries that see nothing, so that their probabilities are 0; and delta."""
    row = tl.cast(head, tl.int64) * num_queries + t
    lse = tl.load(lse_ptr + row, mask=t < num_queries, other=float("-inf"))
    delta = tl.load(delta_ptr + row, mask=t < num_queries, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse * LOG2_E if UNITS == "log2" else lse, delta


@triton.jit
def differentiated(z, slope, dp, lse, delta, keep, kept_scale, SOFTCAP: tl.constexpr, UNITS: tl.constexpr):
    """Probabilities after dropout; the gradients of the scores, and of the products of q and k that they come from."""
    p = tl.exp2(z - lse if UNITS == "log2" else (z - lse) * LOG2_E)
    p_kept = p
    if keep is not None:
        p_kept, dp = tl.where(keep, p * kept_scale, 0.0), tl.where(keep, dp * kept_scale, 0.0)
    ds = p * (dp - delta)
    return p_kept, ds, ds if SOFTCAP == 0.0 else ds * slope


@triton.jit
def from_queries(
    state,
    k,
    k_place,
    v,
    v_place,
    queries,
    grads,
    statistics,
    tables,
    t0,
    s0,
    heads,
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
    """(dk, dv) after the queries from t0 on. Tiles of scores are (keys, queries)."""
    dk, dv = state
    q_ptr, q_stride = queries
    dy_ptr, dy_stride = grads
    head, num_queries = options[0], options[6][0]
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    facts = row_facts(*tables, (t0 + i)[None, :], num_queries, head, heads, CHANGES)
    q_ptr += tl.cast(t0, tl.int64) * q_stride
    dy_ptr += tl.cast(t0, tl.int64) * dy_stride
    q_place = q_ptr, q_stride, num_queries - t0
    q = load_tile(*q_place, DIM, BLOCK_DIM, BLOCK_M, MASKED)
    products = row_products(k, k_place, q, q_place, DIM, BLOCK_DIM, BLOCK_N, BLOCK_M)
    z, slope = scored(products, t0, i[None, :], s0, j[:, None], facts, options, CHANGES, SOFTCAP, UNITS, MASKED)
    lse, delta = load_rows(*statistics, head, t0 + i, num_queries, UNITS)
    dy_place = dy_ptr, dy_stride, num_queries - t0
    dy = load_tile(*dy_place, VALUE_DIM, BLOCK_VALUE, BLOCK_M, MASKED)
    dp = row_products(v, v_place, dy, dy_place, VALUE_DIM, BLOCK_VALUE, BLOCK_N, BLOCK_M)
    keep = kept(t0 + i, s0, options, BLOCK_N, TRANSPOSED=True) if DROPOUT else None
    p, _, dz = differentiated(z, slope, dp, lse[None, :], delta[None, :], keep, options[5][1], SOFTCAP, UNITS)
    dv = product(rounded(p, dy.dtype), dy, dv)
    return product(rounded(dz, q.dtype), q, dk), dv


@triton.jit
def from_keys(
    q,
    q_place,
    dy,
    dy_place,
    keys,
    values,
    lse,
    delta,
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
    """The gradients of the scores with the keys from s0 on, and of the products of q and k; and these keys."""
    k_ptr, k_stride = keys
    v_ptr, v_stride = values
    i, j, remaining = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), options[6][1] - s0
    k_ptr += tl.cast(s0, tl.int64) * k_stride
    v_ptr += tl.cast(s0, tl.int64) * v_stride
    k = load_tile(k_ptr, k_stride, remaining, DIM, BLOCK_DIM, BLOCK_N, MASKED)
    products = row_products(q, q_place, k, (k_ptr, k_stride, remaining), DIM, BLOCK_DIM, BLOCK_M, BLOCK_N)
    z, slope = scored(products, t0, i[:, None], s0, j[None, :], facts, options, CHANGES, SOFTCAP, UNITS, MASKED)
    v = load_tile(v_ptr, v_stride, remaining, VALUE_DIM, BLOCK_VALUE, BLOCK_N, MASKED)
    keep = kept(t0 + i, s0, options, BLOCK_N) if DROPOUT else None
    v_place = v_ptr, v_stride, remaining
    dp = row_products(dy, dy_place, v, v_place, VALUE_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_N)
    _, ds, dz = differentiated(z, slope, dp, lse[:, None], delta[:, None], keep, options[5][1], SOFTCAP, UNITS)
    return ds, dz, k


@triton.jit(do_not_specialize=["threshold", "seed_low", "seed_high"])
def key_kernel(
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
    dy_ptr,
    dy_b_stride,
    dy_t_stride,
    dy_h_stride,
    lse_ptr,
    delta_ptr,
    UNITS: tl.constexpr,
    dk_ptr,
    dv_ptr,
    columns_ptr,
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
    # The first keys are seen by most queries where attention is causal: they come first, of all heads.
    tiles, key_heads = tl.cdiv(num_keys, BLOCK_N), heads // group
    all_heads = tl.num_programs(0) // tiles
    key_head, s0 = tl.program_id(0) % all_heads, tl.program_id(0) // all_heads * BLOCK_N
    b, h = tl.cast(key_head // key_heads, tl.int64), tl.cast(key_head % key_heads, tl.int64)
    k_ptr += b * k_b_stride + h * k_h_stride + tl.cast(s0, tl.int64) * k_s_stride
    v_ptr += b * v_b_stride + h * v_h_stride + tl.cast(s0, tl.int64) * v_s_stride
    k_place, v_place = (k_ptr, k_s_stride, num_keys - s0), (v_ptr, v_s_stride, num_keys - s0)
    k = load_tile(*k_place, DIM, BLOCK_DIM, BLOCK_N, True)
    v = load_tile(*v_place, VALUE_DIM, BLOCK_VALUE, BLOCK_N, True)
    state = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32), tl.zeros((BLOCK_N, BLOCK_VALUE), tl.float32)

    begin, full_begin, full_end, stop = tiles_between(columns_ptr, s0, num_keys, CHANGES, BLOCK_N, BLOCK_M)
    full = full_end - full_begin
    for member in range(group):
        query_head = h * group + member
        queries = q_ptr + b * q_b_stride + query_head * q_h_stride, q_t_stride
        grads = dy_ptr + b * dy_b_stride + query_head * dy_h_stride, dy_t_stride
        options = options_of(
            *(b * heads + query_head, heads, (scale, scale_log2)),
            *(bias_ptr, (bias_b_stride, bias_h_stride, bias_t_stride, bias_s_stride)),
            *(mask_ptr, (mask_b_stride, mask_h_stride, mask_t_stride, mask_s_stride), block_size),
            *((threshold, kept_scale, seed_low, seed_high), (num_queries, num_keys), CHANGES),
        )
        if BLOCK_MASK & CHANGES == 0:
            for tile in range(full_begin, full_end):
                state = from_queries(
                    *(state, k, k_place, v, v_place, queries, grads, (lse_ptr, delta_ptr), (rows_ptr, alibi_ptr)),
                    *(tile * BLOCK_M, s0, heads, options),
                    *(
                        UNITS,
                        CHANGES,
                        SOFTCAP,
                        DROPOUT,
                        DIM,
                        VALUE_DIM,
                        BLOCK_DIM,
                        BLOCK_VALUE,
                        BLOCK_M,
                        BLOCK_N,
                        False,
                    ),
                )
        for tile in range(begin, stop - full):
            tile += tl.where(tile >= full_begin, full, 0)
            if BLOCK_MASK & CHANGES == 0 or lets_through(tile * BLOCK_M, s0, options, BLOCK_M, BLOCK_N):
                state = from_queries(
                    *(state, k, k_place, v, v_place, queries, grads, (lse_ptr, delta_ptr), (rows_ptr, alibi_ptr)),
                    *(tile * BLOCK_M, s0, heads, options),
                    *(UNITS, CHANGES, SOFTCAP, DROPOUT, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_N, True),
                )

    dk, dv = state
    store_tile(dk_ptr, b * num_keys + s0, key_heads, h, num_keys - s0, dk * scale, DIM, BLOCK_DIM, BLOCK_N)
    store_tile(dv_ptr, b * num_keys + s0, key_heads, h, num_keys - s0, dv, VALUE_DIM, BLOCK_VALUE, BLOCK_N)


@triton.jit(do_not_specialize=["threshold", "seed_low", "seed_high"])
def query_kernel(
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
    dy_ptr,
    dy_b_stride,
    dy_t_stride,
    dy_h_stride,
    lse_ptr,
    delta_ptr,
    UNITS: tl.constexpr,
    dq_ptr,
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
    tiles = tl.cdiv(num_queries, BLOCK_M)
    all_heads = tl.num_programs(0) // tiles
    head = tl.program_id(0) % all_heads
    t0 = (tiles - 1 - tl.program_id(0) // all_heads) * BLOCK_M  # as in the forward
    b, h = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    q_ptr += b * q_b_stride + h * q_h_stride + tl.cast(t0, tl.int64) * q_t_stride
    dy_ptr += b * dy_b_stride + h * dy_h_stride + tl.cast(t0, tl.int64) * dy_t_stride
    keys = k_ptr + b * k_b_stride + h // group * k_h_stride, k_s_stride
    values = v_ptr + b * v_b_stride + h // group * v_h_stride, v_s_stride
    options = options_of(
        *(head, heads, (scale, scale_log2)),
        *(bias_ptr, (bias_b_stride, bias_h_stride, bias_t_stride, bias_s_stride)),
        *(mask_ptr, (mask_b_stride, mask_h_stride, mask_t_stride, mask_s_stride), block_size),
        *((threshold, kept_scale, seed_low, seed_high), (num_queries, num_keys), CHANGES),
    )
    t = t0 + tl.arange(0, BLOCK_M)
    facts = row_facts(rows_ptr, alibi_ptr, t[:, None], num_queries, head, heads, CHANGES)
    lse, delta = load_rows(lse_ptr, delta_ptr, head, t, num_queries, UNITS)
    q_place, dy_place = (q_ptr, q_t_stride, num_queries - t0), (dy_ptr, dy_t_stride, num_queries - t0)
    q = load_tile(*q_place, DIM, BLOCK_DIM, BLOCK_M, True)
    dy = load_tile(*dy_place, VALUE_DIM, BLOCK_VALUE, BLOCK_M, True)
    dq = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)

    begin, full_begin, full_end, stop = tiles_between(rows_ptr, t0, num_queries, CHANGES, BLOCK_M, BLOCK_N)
    if BLOCK_MASK & CHANGES == 0:
        for tile in range(full_begin, full_end):
            ds, dz, k = from_keys(
                *(q, q_place, dy, dy_place, keys, values, lse, delta, t0, tile * BLOCK_N, facts, options),
                *(UNITS, CHANGES, SOFTCAP, DROPOUT, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_N, False),
            )
            dq = product(rounded(dz, k.dtype), k, dq)
    full = full_end - full_begin
    for tile in range(begin, stop - full):
        tile += tl.where(tile >= full_begin, full, 0)
        if BLOCK_MASK & CHANGES == 0 or lets_through(t0, tile * BLOCK_N, options, BLOCK_M, BLOCK_N):
            ds, dz, k = from_keys(
                *(q, q_place, dy, dy_place, keys, values, lse, delta, t0, tile * BLOCK_N, facts, options),
                *(UNITS, CHANGES, SOFTCAP, DROPOUT, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_N, True),
            )
            dq = product(rounded(dz, k.dtype), k, dq)
    store_tile(dq_ptr, b * num_queries + t0, heads, h, num_queries - t0, dq * scale, DIM, BLOCK_DIM, BLOCK_M)


@triton.jit(do_not_specialize=["threshold", "seed_low", "seed_high"])
def bias_kernel(
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
    dy_ptr,
    dy_b_stride,
    dy_t_stride,
    dy_h_stride,
    lse_ptr,
    delta_ptr,
    UNITS: tl.constexpr,
    dbias_ptr,
    bias_heads_apart,  # query heads are counted over the batch
    repeats,
    repeats_apart,
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
    """dbias (·, ·, T, S). Its head n is of query heads n · bias_heads_apart, and of `repeats` of them repeats_apart."""
    tiles_across, tiles = tl.cdiv(num_keys, BLOCK_N), tl.cdiv(num_queries, BLOCK_M) * tl.cdiv(num_keys, BLOCK_N)
    bias_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    t0, s0 = tile // tiles_across * BLOCK_M, tile % tiles_across * BLOCK_N
    t, s = (t0 + tl.arange(0, BLOCK_M))[:, None], (s0 + tl.arange(0, BLOCK_N))[None, :]
    begin, full_begin, full_end, stop = tiles_between(rows_ptr, t0, num_queries, CHANGES, BLOCK_M, BLOCK_N)
    seen = (s0 // BLOCK_N >= begin) & (s0 // BLOCK_N < stop)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for repeat in range(tl.where(seen, repeats, 0)):
        head = bias_head * bias_heads_apart + repeat * repeats_apart
        b, h = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
        queries = q_ptr + b * q_b_stride + h * q_h_stride + tl.cast(t0, tl.int64) * q_t_stride
        grads = dy_ptr + b * dy_b_stride + h * dy_h_stride + tl.cast(t0, tl.int64) * dy_t_stride
        keys = k_ptr + b * k_b_stride + h // group * k_h_stride, k_s_stride
        values = v_ptr + b * v_b_stride + h // group * v_h_stride, v_s_stride
        options = options_of(
            *(head, heads, (scale, scale_log2)),
            *(bias_ptr, (bias_b_stride, bias_h_stride, bias_t_stride, bias_s_stride)),
            *(mask_ptr, (mask_b_stride, mask_h_stride, mask_t_stride, mask_s_stride), block_size),
            *((threshold, kept_scale, seed_low, seed_high), (num_queries, num_keys), CHANGES),
        )
        facts = row_facts(rows_ptr, alibi_ptr, t, num_queries, head, heads, CHANGES)
        lse, delta = load_rows(lse_ptr, delta_ptr, head, t0 + tl.arange(0, BLOCK_M), num_queries, UNITS)
        q_place, dy_place = (queries, q_t_stride, num_queries - t0), (grads, dy_t_stride, num_queries - t0)
        q = load_tile(*q_place, DIM, BLOCK_DIM, BLOCK_M, True)
        dy = load_tile(*dy_place, VALUE_DIM, BLOCK_VALUE, BLOCK_M, True)
        ds, dz, k = from_keys(
            *(q, q_place, dy, dy_place, keys, values, lse, delta, t0, s0, facts, options),
            *(UNITS, CHANGES, SOFTCAP, DROPOUT, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_N, True),
        )
        dbias += ds
    place = (tl.cast(bias_head, tl.int64) * num_queries + t) * num_keys + s
    store(dbias_ptr + place, dbias, (t < num_queries) & (s < num_keys))


def backward(
    dy: Tensor, dlse: Tensor | None, y: Tensor, lse: Tensor, *args: Any, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dsinks); of the last two, no elements where there is nothing to say."""
    given, needs_dbias = Arguments(*args[:-1]), args[-1]
    q, k, v, bias, sinks = given.q, given.k, given.v, given.bias, given.sinks
    (batch, queries, heads, dim), keys, value_dim = q.shape, k.shape[1], v.shape[-1]
    dq, dk, dv = (contiguous_like(x) for x in (q, k, v)) if out is None else out
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    dbias = torch.empty(bias.shape if bias is not None and needs_dbias else (0,), dtype=q.dtype, device=q.device)
    units = "natural" if q.dtype == torch.float32 else "log2"  # the last is rounded less finely
    inputs = *placed(q), *placed(k), *placed(v), *placed(dy), lse.contiguous(), delta, units
    told = shared(given)
    dims = widths(dim, value_dim)
    width = max(dims)
    with device_of(q):
        if delta.numel():
            gradient = None if dlse is None else dlse.contiguous()
            delta_kernel[(triton.cdiv(queries, 64) * batch * heads,)](
                *(*placed(dy), *placed(y), gradient, delta, queries, heads, value_dim, dims[1], 64),
                num_warps=4,
            )
            block_m, block_n, warps, stages = tile_sizes("query", given, width)
            query_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
                *(*inputs, dq, *told, *dims, block_m, block_n), num_warps=warps, num_stages=stages
            )
        if dk.numel():
            block_m, block_n, warps, stages = tile_sizes("key", given, width)
            key_kernel[(triton.cdiv(keys, block_n) * batch * k.shape[2],)](
                *(*inputs, dk, dv, column_bounds(told.rows, keys), *told, *dims, block_m, block_n),
                num_warps=warps,
                num_stages=stages,
            )
        if bias is not None and dbias.numel():
            block_m, block_n, warps, stages = tile_sizes("bias", given, width)
            tiles = triton.cdiv(queries, block_m) * triton.cdiv(keys, block_n)
            bias_kernel[(tiles * bias.shape[0] * bias.shape[1],)](
                *(*inputs, dbias, *repeats(bias, batch, heads), *told, *dims, block_m, block_n),
                num_warps=warps,
                num_stages=stages,
            )
    dsinks = q.new_empty(0) if sinks is None else reference.sinks_gradient(delta, lse, sinks)
    return dq, dk, dv, dbias, dsinks


def repeats(bias: Tensor, batch: int, heads: int) -> tuple[int, int, int]:
    """(bias_heads_apart, repeats, repeats_apart) of `bias_kernel`."""
    if bias.shape[1] == heads:
        return 1, batch // bias.shape[0], heads
    return heads, (heads if bias.shape[0] == batch else batch * heads), 1
