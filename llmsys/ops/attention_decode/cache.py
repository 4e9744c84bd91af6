"""A cache of keys and values: (B, S_max, K, D), or paged, (num_blocks, block_size, K, D) with a table of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops import _check


def check(
    op: str,
    given: Tensor,
    name: str,
    heads: int,
    head_dims: tuple[int, int],
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    """k_cache and v_cache fit each other, their scales, the lengths and the table, and `given` (B, …), called `name`,
    whose dtype they have unless they are int8."""
    if given.dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.{op}: {name} is {given.dtype}, expected float32, bfloat16, float16 or float64")
    batch, (k_cache, v_cache) = given.shape[0], caches
    layout = "(B, S_max, K, ·)" if block_table is None else "(num_blocks, block_size, K, ·)"
    for cache_name, cache, dim in zip(("k_cache", "v_cache"), caches, head_dims, strict=True):
        if cache.dtype not in (given.dtype, torch.int8):
            raise TypeError(f"llmsys.{op}: {cache_name} is {cache.dtype}, expected {given.dtype} ({name}'s) or int8")
        if cache.dim() != 4 or cache.shape[2:] != (heads, dim):
            raise ValueError(
                f"llmsys.{op}: {cache_name} has shape {tuple(cache.shape)}, expected {layout} ending in "
                f"({heads}, {dim})"
            )
    if v_cache.dtype != k_cache.dtype or v_cache.shape[:2] != k_cache.shape[:2]:
        raise ValueError(
            f"llmsys.{op}: k_cache is {tuple(k_cache.shape)} {k_cache.dtype} and v_cache {tuple(v_cache.shape)} "
            f"{v_cache.dtype}, expected one dtype and room for the same tokens"
        )
    if block_table is None and k_cache.shape[0] != batch:
        raise ValueError(f"llmsys.{op}: k_cache has shape {tuple(k_cache.shape)}, expected {layout} with B={batch}")
    _check_scales(op, given, k_cache, scales)
    _check_table(op, batch, cache_seqlens, block_table)
    others = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": scales[0], "v_scale": scales[1]}
    for other, tensor in (others | {"cache_seqlens": cache_seqlens, "block_table": block_table}).items():
        if tensor is not None and tensor.device != given.device:
            raise ValueError(f"llmsys.{op}: {other} is on {tensor.device}, expected {given.device}, as {name} is")


def _check_scales(op: str, given: Tensor, k_cache: Tensor, scales: tuple[Tensor | None, Tensor | None]) -> None:
    wide = torch.promote_types(given.dtype, torch.float32)
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if (scale is not None) != (k_cache.dtype == torch.int8):
            what = "None" if scale is None else f"{tuple(scale.shape)} {scale.dtype}"
            raise ValueError(
                f"llmsys.{op}: {name} is {what} and the cache {k_cache.dtype}, expected scales with an int8 cache and "
                "with no other"
            )
        if scale is None:
            continue
        if scale.dtype != wide:
            raise TypeError(f"llmsys.{op}: {name} is {scale.dtype}, expected {wide}")
        if scale.shape != k_cache.shape[:3]:
            raise ValueError(
                f"llmsys.{op}: {name} has shape {tuple(scale.shape)}, expected {tuple(k_cache.shape[:3])}, one for "
                "each token and key head of the cache"
            )


def _check_table(op: str, batch: int, cache_seqlens: Tensor, block_table: Tensor | None) -> None:
    for name, tensor in (("cache_seqlens", cache_seqlens), ("block_table", block_table)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(f"llmsys.{op}: {name} is {tensor.dtype}, expected torch.int32")
    if cache_seqlens.shape != (batch,):
        raise ValueError(
            f"llmsys.{op}: cache_seqlens has shape {tuple(cache_seqlens.shape)}, expected ({batch},), one for "
            "each sequence"
        )
    if block_table is not None and (block_table.dim() != 2 or block_table.shape[0] != batch):
        raise ValueError(
            f"llmsys.{op}: block_table has shape {tuple(block_table.shape)}, expected ({batch}, max_blocks)"
        )


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """How many tokens of one sequence there is room for."""
    return cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]


def check_places(
    op: str, cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, *, appended: int | None = None
) -> None:
    """The keys that count, or with `appended` the places of so many after them, are inside the cache, and the blocks
    that hold them listed. A GPU is not asked, nor a tensor without data.
    """
    if not cache_seqlens.is_cpu or type(cache_seqlens) is not Tensor:
        return
    lengths, room, added = cache_seqlens.tolist(), capacity(cache, block_table), appended or 0
    if lengths and (min(lengths) < 0 or max(lengths) + added > room):
        raise ValueError(
            f"llmsys.{op}: cache_seqlens is {lengths}"
            + (f" before {added} more tokens" if added else "")
            + f", expected numbers from 0 to {room - added}, as the cache has room for {room} tokens of a sequence"
        )
    if block_table is None or block_table.numel() == 0:
        return
    low, high = (int(bound) for bound in block_table.aminmax())
    if low >= 0 and high < cache.shape[0]:
        return
    index, size = torch.arange(block_table.shape[1]), cache.shape[1]
    end = cache_seqlens.unsqueeze(1) + added
    used = index * size < end
    if appended is not None:
        used &= (index + 1) * size > cache_seqlens.unsqueeze(1)
    wrong = (used & ((block_table < 0) | (block_table >= cache.shape[0]))).nonzero().tolist()
    if wrong:
        b, i = wrong[0]
        raise ValueError(
            f"llmsys.{op}: block_table[{b}, {i}] is {int(block_table[b, i])}, expected a block from 0 to "
            f"{cache.shape[0] - 1}, as it holds tokens {i * size} to {i * size + size - 1} of a sequence that reaches "
            f"to {int(end[b])}"
        )


def gathered(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """(B, S, …), the cache of each sequence; what a table does not list may be any block."""
    if block_table is None:
        return cache
    if cache.shape[0] == 0:  # nothing is listed
        return cache.new_zeros((block_table.shape[0], 0, *cache.shape[2:]))
    return cache[block_table.clamp(0, cache.shape[0] - 1).long()].flatten(1, 2)
