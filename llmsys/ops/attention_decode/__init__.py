"""Attention of one or a few new tokens to a cache of keys and values: the contract."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.attention.arguments import MAX_HEAD_DIM
from llmsys.ops.attention_decode import cache, native, reference

OP = Op(
    "attention_decode",
    forward="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table=None,"
    " Tensor? k_scale=None, Tensor? v_scale=None, Tensor? alibi_slopes=None, Tensor? sinks=None, int window_left=-1,"
    " int window_right=-1, float scale=1.0, float softcap=0.0) -> (Tensor y, Tensor lse)",
    backward=None,
    implementations=[
        native.CPU,
        triton("llmsys.ops.attention_decode.triton_kernels"),
        Impl("reference", reference.forward),
    ],
)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`llmsys.attention` of the last T tokens of each sequence to all of them, whose keys and values are in a cache.

        k[s] = k_cache[b, s], or of a paged cache k_cache[block_table[b, s // block_size], s % block_size];
        times k_scale of the same place where the cache is int8; v alike; s < cache_seqlens[b]

    A query t has the place cache_seqlens[b] − T + t: `append_kv` has put the T tokens in before. `causal`, `window`,
    `scale`, `softcap`, `alibi_slopes` and `sinks` are those of `llmsys.attention`.

    Shapes     q (B, T, H, D), any strides; k_cache (B, S_max, K, D) and v_cache (B, S_max, K, E), H a multiple of K, D
               and E from 1 to 256; or paged, (num_blocks, block_size, K, ·) with block_table int32 (B, max_blocks), of
               which the entries of blocks that hold what counts are read; cache_seqlens int32 (B,), the keys that count
               → y (B, T, H, E), contiguous; with return_lse (y, lse), lse (B, H, T) float32 (float64 for float64)
    Dtypes     q float16/bfloat16/float32/float64; caches of q's, or int8 with k_scale and v_scale float32 (float64 for
               float64), (B, S_max, K) or (num_blocks, block_size, K)
    Numerics   as `llmsys.attention`; on the CPU the same bits whatever the number of threads, paged or not, and with
               other sequences or alone. What lies in the cache from cache_seqlens on is not read. A query that sees
               nothing has y 0 and lse −inf
    Gradient   none
    Cost       cache_seqlens · K · (D + E) · itemsize bytes: bound by bandwidth where few query heads share a key head
    Errors     ValueError if shapes, devices or options do not fit as above, a tensor requires a gradient, or, on the
               CPU, a length or a listed block is outside the cache; TypeError for a dtype not named above
    Source     split over keys: Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding; paged: Kwon et al. 2023,
               arXiv:2309.06180
    """
    if q.dim() != 4 or k_cache.dim() != 4 or v_cache.dim() != 4:
        raise ValueError(
            f"llmsys.attention_decode: q has shape {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)}, expected q (B, T, H, D) and caches of four dimensions"
        )
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"llmsys.attention_decode: q has {heads} heads and k_cache {kv_heads}, expected a multiple of those"
        )
    for name, dim in (("D", q.shape[-1]), ("E", v_cache.shape[-1])):
        if not 0 < dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"llmsys.attention_decode: head dim {name} is {dim}, expected one from 1 to {MAX_HEAD_DIM}"
            )
    scales = k_scale, v_scale
    dims = q.shape[-1], v_cache.shape[-1]
    cache.check("attention_decode", q, "q", kv_heads, dims, (k_cache, v_cache), scales, cache_seqlens, block_table)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    _check_options(q, window, scale, softcap, alibi_slopes, sinks)
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("sinks", sinks)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"llmsys.attention_decode: {name} requires a gradient, expected none, as there is no backward; use "
                "torch.no_grad(), or llmsys.attention to train"
            )
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(q.shape[0], -1)
    left, right = window
    y, lse = OP(
        *(q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes, sinks),
        *(left, 0 if causal else right, float(scale), float(softcap)),
    )
    return (y, lse) if return_lse else y


def _check_options(
    q: Tensor, window: tuple[int, int], scale: float, softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None
) -> None:
    if len(window) != 2 or not all(isinstance(size, int) and size >= -1 for size in window):
        raise ValueError(
            f"llmsys.attention_decode: window is {window}, expected (left, right) numbers of keys seen before and "
            "after the query's own place, -1 for all"
        )
    if not 0 <= softcap < math.inf:
        raise ValueError(f"llmsys.attention_decode: softcap is {softcap}, expected a number above 0, or 0 for none")
    if not math.isfinite(scale):
        raise ValueError(f"llmsys.attention_decode: scale is {scale}, expected a finite number")
    batch, heads = q.shape[0], q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, tensor, shapes in (
        ("sinks", sinks, [(heads,)]),
        ("alibi_slopes", alibi_slopes, [(heads,), (batch, heads)]),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in (q.dtype, wide):
            raise TypeError(f"llmsys.attention_decode: {name} is {tensor.dtype}, expected {q.dtype} (q's) or {wide}")
        if tuple(tensor.shape) not in shapes or tensor.device != q.device:
            raise ValueError(
                f"llmsys.attention_decode: {name} has shape {tuple(tensor.shape)} on {tensor.device}, expected one of "
                f"{shapes} on {q.device}"
            )
