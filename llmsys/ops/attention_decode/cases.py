"""Attention to a cache: inputs, sizes, cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmsys.ops._cases import random
from llmsys.ops.append_kv.reference import quantise
from llmsys.ops.attention_decode.arguments import Arguments

# A shape is (B, T, S, H, K, D, E): sequences, new tokens, room for keys, query heads, key heads, head dims of q and k,
# and of v.
SMALL = (
    *((0, 1, 3, 1, 1, 8, 8), (1, 0, 5, 2, 1, 8, 8), (2, 2, 0, 2, 2, 5, 3)),
    *((1, 1, 1, 1, 1, 1, 1), (3, 3, 4, 2, 1, 7, 7), (1, 1, 17, 3, 1, 16, 16), (2, 1, 33, 6, 6, 96, 96)),
    *((2, 2, 31, 14, 2, 33, 20), (1, 1, 300, 10, 1, 256, 64), (1, 5, 129, 4, 1, 32, 32), (1, 1, 600, 8, 1, 64, 64)),
    *((2, 3, 70, 16, 2, 128, 128), (5, 1, 270, 4, 2, 40, 72)),
)
LARGE = tuple((batch, 1, 4096, 32, 4, 128, 128) for batch in (1, 4))
EDGES = ((1, 1, 4096, 4, 4, 80, 80), (1, 4, 1024, 8, 1, 256, 256))
VARIANTS: tuple[dict, ...] = (
    {},
    {"causal": False},
    {"window": (5, 0)},
    {"causal": False, "window": (20, 1)},
    {"scale": -0.4},
    {"spread": 6.0},
    {"softcap": 2.0},
    {"alibi": True},
    {"sinks": True},
    {"block_size": 16},
    {"block_size": 5, "window": (40, 0)},
    {"int8": True},
    {"int8": True, "uneven": True},
    {"int8": True, "block_size": 32, "softcap": 3.0, "alibi": True, "sinks": True},
)


def shape(*size: int) -> tuple[int, ...]:
    """The case for a (…, D) that all ops are given: keys for each of its rows, and three more."""
    *rows, dim = size
    batch, keys = (rows[0], rows[-1]) if len(rows) > 1 else (1, rows[0])
    dim = min(dim, 256)
    return batch, 2, keys + 3, 2, 1, dim, dim


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    spread: float = 1.0,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    block_size: int = 0,  # 0: contiguous
    int8: bool = False,
    uneven: bool = False,
    full: bool = False,
) -> tuple:
    """Forward arguments in schema order; `spread` multiplies q. The first sequence fills its room, the second half of
    it, the third is empty; all fill it if `full`. What does not count is NaN, and no block of it is listed. `uneven`:
    some scales of int8 are a millionth of their neighbours', or below zero, and some codes −128.
    """
    batch, tokens, room, heads, kv_heads, dim, value_dim = shape
    q, k, v, sink, slopes = random(
        *(seed, device, ((batch, tokens, heads, dim), dtype), ((batch, room, kv_heads, dim), dtype)),
        *(((batch, room, kv_heads, value_dim), dtype), ((heads,), torch.float32), ((batch, heads), torch.float32)),
    )
    lengths = torch.tensor(
        [(room, room // 2, 0, min(room, 1), max(room - 1, 0))[0 if full else b % 5] for b in range(batch)]
    )
    counts = (torch.arange(room) < lengths.unsqueeze(1)).to(device)
    cache_seqlens = lengths.to(device, torch.int32)
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if int8:
        (k, k_scale), (v, v_scale) = (quantise(x.float()) for x in (k, v))
        for codes, units in ((k, k_scale), (v, v_scale)) if uneven else ():
            units[:, ::7] *= 1e-6
            units[:, 1::7] *= -1
            codes[:, 2::7] = -128
        wide = torch.promote_types(dtype, torch.float32)
        scales = k_scale.to(wide), v_scale.to(wide)
    tensors = [
        None if tensor is None else tensor.where(counts.view(*counts.shape, *[1] * (tensor.dim() - 2)), _hidden(tensor))
        for tensor in (k, v, *scales)
    ]
    table = None
    if block_size:
        table = _table(lengths, -(-room // block_size), block_size).to(device)
        tensors = [None if tensor is None else _paged(tensor, table, block_size) for tensor in tensors]
    k, v, k_scale, v_scale = tensors  # type: ignore[assignment]
    return (
        *(q * spread, k, v, cache_seqlens, table, k_scale, v_scale, slopes.abs() if alibi else None),
        *(sink if sinks else None, window[0], 0 if causal else window[1]),
        *(1 / math.sqrt(dim) if scale is None else scale, softcap),
    )


def _hidden(like: Tensor) -> float:
    """What lies where nothing counts."""
    return math.nan if like.is_floating_point() else 99


def _table(lengths: Tensor, blocks: int, block_size: int) -> Tensor:
    """Block 0, which counts, and then from the last but one down, the last is left over; −1 where none is needed."""
    count = len(lengths) * blocks
    table = (-torch.arange(count, dtype=torch.int32)).remainder(max(count, 1)).view(len(lengths), blocks)
    used = torch.arange(blocks) * block_size < lengths.unsqueeze(1)
    return table.where(used, -1)


def _paged(x: Tensor, table: Tensor, block_size: int) -> Tensor:
    """(B, S, …) as blocks, at the places that `table` gives them."""
    batch, blocks = table.shape
    pages = x.new_full((batch * blocks + 1, block_size, *x.shape[2:]), _hidden(x))
    padded = x.new_full((batch, blocks * block_size, *x.shape[2:]), _hidden(x))
    padded[:, : x.shape[1]] = x
    used = table.flatten() >= 0
    if x.device.type != "meta":
        pages[table.flatten()[used].long()] = padded.view(batch * blocks, *pages.shape[1:])[used]
    return pages


def traffic(direction: str, *args: object) -> int:
    """Bytes that must move: the keys and values that count and their scales, and q in, y out."""
    given = Arguments(*args)  # type: ignore[arg-type]
    q, k_cache = given.q, given.k_cache
    dims = q.shape[-1] + given.v_cache.shape[-1]
    row = dims * k_cache.element_size() + (0 if given.k_scale is None else 8)
    return _keys(given) * k_cache.shape[2] * row + q.shape[:-1].numel() * dims * q.element_size()


def flops(direction: str, *args: object) -> int:
    """A product and a sum for each query, key and element, with q and with v."""
    given = Arguments(*args)  # type: ignore[arg-type]
    q = given.q
    return 2 * _keys(given) * q.shape[1] * q.shape[2] * (q.shape[-1] + given.v_cache.shape[-1])


def _keys(given: Arguments) -> int:
    """Of all sequences; masks and windows are not counted."""
    if given.cache_seqlens.device.type == "meta":
        return given.k_cache.shape[:2].numel()
    return int(given.cache_seqlens.sum())
