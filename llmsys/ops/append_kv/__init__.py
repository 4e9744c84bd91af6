"""Appending to a cache of keys and values: the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops._op import Impl, InPlaceOp, triton
from llmsys.ops.append_kv import native, reference
from llmsys.ops.attention_decode import cache
from llmsys.ops.rope import check_arguments, overlaps

OP = InPlaceOp(
    "append_kv",
    forward="(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale,"
    " Tensor cache_seqlens, Tensor? block_table=None, Tensor? cos=None, Tensor? sin=None, bool interleaved=False)"
    " -> ()",
    backward=None,
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.append_kv.triton_kernels"),
        Impl("reference", reference.forward),
    ],
)


@torch.no_grad()
def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Write the keys and values of T new tokens of each sequence into its cache, in place, behind those that are there.

        k_cache[b, cache_seqlens[b] + t] = rope(k, cos, sin)[b, t], or k[b, t] without tables;  v_cache likewise of v
        int8: scale = max_d |x[d]| / 127,  code[d] = round(x[d] / scale), of each token and key head

    A paged cache is (num_blocks, block_size, K, ·): token s of sequence b is in block block_table[b, s // block_size],
    at s % block_size. cache_seqlens is what was there before, and is not changed: `attention_decode` wants it T higher.

    Shapes     k (B, T, K, D), v (B, T, K, E), any strides; k_cache (B, S_max, K, D) and v_cache (B, S_max, K, E), or
               paged with block_table int32 (B, max_blocks); cache_seqlens int32 (B,); cos and sin as `llmsys.rope` has
               them, a row for each new token, (T, R/2) or (B, T, R/2)
    Dtypes     k and v float16/bfloat16/float32/float64, caches of theirs, or int8 with k_scale and v_scale float32
               (float64 for float64), (B, S_max, K) or (num_blocks, block_size, K), which are written too
    Numerics   rotated and quantised in float32 (float64 for float64); rounded once, to nearest even. A head of zeros
               has scale 0; one with NaN or infinity has that as its scale and codes 0
    Gradient   none
    Cost       B·T·K·(D + E)·(itemsize in and out) bytes
    Errors     ValueError if shapes or devices do not fit as above, elements of a cache share memory, or, on the CPU, a
               token falls outside the cache or into a block that is not listed: then nothing is written; TypeError for
               a dtype not named above
    Source     paged: Kwon et al. 2023, arXiv:2309.06180
    """
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            f"llmsys.append_kv: k is {tuple(k.shape)} {k.dtype} on {k.device} and v {tuple(v.shape)} {v.dtype} on "
            f"{v.device}, expected k (B, T, K, D) and v (B, T, K, E) of one dtype on one device"
        )
    dims, caches, scales = (k.shape[-1], v.shape[-1]), (k_cache, v_cache), (k_scale, v_scale)
    cache.check("append_kv", k, "k", k.shape[2], dims, caches, scales, cache_seqlens, block_table)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if tensor is not None and overlaps(tensor):
            raise ValueError(
                f"llmsys.append_kv: {name} has strides {tensor.stride()}, expected elements that do not share memory"
            )
    if (cos is None) != (sin is None):
        missing = "cos" if cos is None else "sin"
        raise ValueError(f"llmsys.append_kv: {missing} is None, expected both of cos and sin, or neither")
    if cos is not None and sin is not None:
        check_arguments("append_kv", k, cos, sin, "k")
    OP(k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, cos, sin, interleaved)
