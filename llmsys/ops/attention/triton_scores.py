"""What the attention kernels share: tiles of q, k and v, the scores of a tile, and which tiles there are.

Tensors of a row of scores, such as `first`, come in the shape that broadcasts over the tile, (queries, 1) or
(1, queries): a tile may be (queries, keys) or (keys, queries). Offsets are 64 bits wide from tile to tile, and 32
within a tile.

Scores come in one of three units: "products", of q and k as they are; "natural", as the op defines them; or "log2", so
that e^score is one exp2. The first two keep the difference of equal scores exactly 0, the first and the last save the
multiplication of each score.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._triton import INTERPRETED, load, philox, seed_words, store, to_float32
from llmsys.ops.attention.arguments import Arguments
from llmsys.ops.attention.bounds import row_bounds
from llmsys.ops.cross_entropy.triton_kernels import sloped_cap
from llmsys.ops.dropout.reference import threshold_and_scale

LOG2_E = tl.constexpr(math.log2(math.e))
PIECE = tl.constexpr(16)
# Bits of CHANGES: what scores are changed by. An address that is not needed is another's, as Triton 3.6 takes no None
# in a tuple. The constant comes first, as Triton's interpreter passes CHANGES as a plain number.
BIAS, BLOCK_MASK, ALIBI = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
MAX_STRIDE = 2**24  # times the rows of a tile stays below 2³¹


@triton.jit
def product(a, b, sums=None):
    """sums + a b, of 16-bit tiles on tensor cores."""
    if INTERPRETED:  # whose dot would multiply the bits of bfloat16
        a, b = to_float32(a), to_float32(b)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def load_tile(
    ptr, stride, remaining, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHECKED: tl.constexpr
):
    """Rows of q, k, v or dy, 0 where there are none. CHECKED: there may be less than BLOCK_ROWS, namely `remaining`."""
    row, col = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    ptr += row * stride + col
    if CHECKED and DIM < BLOCK_DIM:
        return tl.load(ptr, mask=(row < remaining) & (col < DIM), other=0.0)
    elif CHECKED:
        return tl.load(ptr, mask=row < remaining, other=0.0)
    elif DIM < BLOCK_DIM:
        return tl.load(ptr, mask=col < DIM, other=0.0)
    else:
        return tl.load(ptr)


@triton.jit
def row_products(
    a, a_place, b, b_place, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr
):
    """a bᵀ of tiles that were loaded at (ptr, stride, remaining). Without tensor cores a thread has the whole rows that
    it multiplies in registers: of float32, pieces of them are loaded again."""
    if a.dtype == tl.float32:
        sums = tl.zeros((A_ROWS, B_ROWS), tl.float32)
        a_ptr, a_stride, a_remaining = a_place
        b_ptr, b_stride, b_remaining = b_place
        a_row, b_row, col = tl.arange(0, A_ROWS)[:, None], tl.arange(0, B_ROWS)[:, None], tl.arange(0, PIECE)[None, :]
        for start in range(0, BLOCK_DIM, PIECE):
            inside = start + col < DIM
            a_piece = tl.load(a_ptr + a_row * a_stride + start + col, (a_row < a_remaining) & inside, 0.0)
            b_piece = tl.load(b_ptr + b_row * b_stride + start + col, (b_row < b_remaining) & inside, 0.0)
            sums = product(a_piece, tl.trans(b_piece), sums)
        return sums
    else:
        return product(a, tl.trans(b))


@triton.jit
def store_tile(
    ptr, start, heads, h, remaining, values, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Write `values` as the rows from `start` on of head `h`, of (rows, heads, DIM) without gaps."""
    row, col = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    ptr += (start * heads + h) * DIM
    store(ptr + row * (heads * DIM) + col, values, (row < remaining) & (col < DIM))


@triton.jit
def tiles_of(first, first_full, end_full, end, BLOCK: tl.constexpr):
    """Tiles that touch [first, end): (begin, full_begin, full_end, stop). Those from full_begin to full_end lie in
    [first_full, end_full), where nothing need be masked."""
    begin = first // BLOCK
    stop = tl.maximum(tl.cdiv(end, BLOCK), begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(first_full, BLOCK), begin), stop)
    full_end = tl.minimum(tl.maximum(end_full // BLOCK, full_begin), stop)
    return begin, full_begin, full_end, stop


@triton.jit
def tiles_between(bounds_ptr, start, size, CHANGES: tl.constexpr, BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr):
    """`tiles_of` the keys that the BLOCK queries from `start` on see, or of the queries that see such keys:
    `bounds_ptr` has where runs start, and after `size` of them where they end. With a block mask no tile is free."""
    last = tl.minimum(start + BLOCK, size) - 1
    first, first_full = tl.load(bounds_ptr + start), tl.load(bounds_ptr + last)
    end_full, end = tl.load(bounds_ptr + size + start), tl.load(bounds_ptr + size + last)
    if BLOCK_MASK & CHANGES:
        end_full = end_full * 0
    return tiles_of(first, first_full, end_full, end, OTHER_BLOCK)


@triton.jit
def options_of(
    head,
    heads,
    scales,
    bias_ptr,
    bias_strides,
    mask_ptr,
    mask_strides,
    block_size,
    dropout,
    sizes,
    CHANGES: tl.constexpr,
):
    """What is the same for all tiles of a head, counted over batch and heads."""
    b, h = tl.cast(head // heads, tl.int64), head % heads
    if BIAS & CHANGES:
        bias_ptr += b * bias_strides[0] + h * tl.cast(bias_strides[1], tl.int64)
    if BLOCK_MASK & CHANGES:
        mask_ptr += b * mask_strides[0] + h * tl.cast(mask_strides[1], tl.int64)
    bias, block_mask = (bias_ptr, bias_strides[2], bias_strides[3]), (mask_ptr, mask_strides[2], mask_strides[3])
    return head, scales, bias, block_mask, block_size, dropout, sizes


@triton.jit
def row_facts(rows_ptr, alibi_ptr, t, num_queries, head, heads, CHANGES: tl.constexpr):
    """(first, end, place, ALiBi slope) of queries `t`; those beyond the last one see nothing."""
    inside = t < num_queries
    first = tl.load(rows_ptr + t, mask=inside, other=0)
    end = tl.load(rows_ptr + num_queries + t, mask=inside, other=0)
    place, slope = first, 0.0
    if ALIBI & CHANGES:
        place = tl.load(rows_ptr + 2 * num_queries + t, mask=inside, other=0)
        sequence = tl.load(rows_ptr + 3 * num_queries + t, mask=inside, other=0)
        slope = tl.load(alibi_ptr + head + sequence * heads, mask=inside, other=0.0)
    return first, end, place, slope


@triton.jit
def load_mask(t0, i, s0, j, block_mask, block_size, inside):
    """What the block mask says of queries t0 + i and keys s0 + j."""
    ptr, t_stride, s_stride = block_mask
    first_t, first_s = t0 // block_size, s0 // block_size
    ptr += tl.cast(first_t, tl.int64) * t_stride + tl.cast(first_s, tl.int64) * s_stride
    down, across = (t0 + i) // block_size - first_t, (s0 + j) // block_size - first_s
    return tl.load(ptr + down * t_stride + across * s_stride, mask=inside, other=0) != 0


@triton.jit
def lets_through(t0, s0, options, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the block mask lets one of the queries from t0 on see one of the keys from s0 on."""
    num_queries, num_keys = options[6]
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    inside = (t0 + i < num_queries) & (s0 + j < num_keys)
    seen = load_mask(t0, i, s0, j, options[3], options[4], inside)
    return tl.max(tl.max(seen.to(tl.int32), 1), 0) != 0


@triton.jit
def scored(
    products,
    t0,
    i,
    s0,
    j,
    facts,
    options,
    CHANGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNITS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The scores of queries t0 + i with keys s0 + j, and the slope of the softcap there. MASKED: -inf where a query
    does not see a key."""
    first, end, place, alibi = facts
    _, scales, bias, block_mask, block_size, _, sizes = options
    scale, scale_log2 = scales
    num_queries, num_keys = sizes
    unit: tl.constexpr = LOG2_E if UNITS == "log2" else 1.0
    s = s0 + j
    z, slope = products, 1.0
    if SOFTCAP != 0.0:
        z, slope = sloped_cap(products * scale, SOFTCAP)
        z *= unit
    elif UNITS == "natural":
        z *= scale
    elif UNITS == "log2":
        z *= scale_log2
    if ALIBI & CHANGES:
        z -= (alibi * unit) * tl.abs(place - s).to(tl.float32)
    seen = (j >= first - s0) & (j < end - s0)  # with s itself registers spill on sm_80
    bias_ptr, bias_t_stride, bias_s_stride = bias
    if BIAS & CHANGES:
        bias_ptr += tl.cast(t0, tl.int64) * bias_t_stride + tl.cast(s0, tl.int64) * bias_s_stride
        inside = seen if MASKED else (t0 + i < num_queries) & (s < num_keys)
        z += load(bias_ptr + i * bias_t_stride + j * bias_s_stride, inside) * unit
    if MASKED:
        if BLOCK_MASK & CHANGES:
            seen = load_mask(t0, i, s0, j, block_mask, block_size, seen)
        z = tl.where(seen, z, float("-inf"))
    return z, slope


@triton.jit
def kept(t, s0, options, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Where dropout keeps the probabilities of queries `t` with the keys from s0 on, a multiple of 4."""
    head, _, _, _, _, dropout, sizes = options
    threshold, _, seed_low, seed_high = dropout
    num_queries, num_keys = sizes
    row = (tl.cast(head, tl.int64) * num_queries + t) * tl.cdiv(num_keys, 4)
    counter = row[:, None] + (s0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = philox(seed_low, seed_high, counter)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # The threshold comes with its highest bit flipped, as a signed number, and so does each word.
    keep = (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
    return tl.trans(keep) if TRANSPOSED else keep


class Shared(NamedTuple):
    """The arguments that all kernels end in, in their order; what tiles are follows."""

    rows: Tensor
    alibi: Tensor
    bias: Tensor
    bias_b_stride: int
    bias_h_stride: int
    bias_t_stride: int
    bias_s_stride: int
    block_mask: Tensor
    mask_b_stride: int
    mask_h_stride: int
    mask_t_stride: int
    mask_s_stride: int
    block_size: int
    num_queries: int
    num_keys: int
    heads: int
    group: int  # query heads of a key head
    scale: float
    scale_log2: float
    threshold: int
    kept_scale: float
    seed_low: int
    seed_high: int
    CHANGES: int
    SOFTCAP: float
    DROPOUT: bool
    DIM: int
    VALUE_DIM: int


def shared(given: Arguments) -> Shared:
    """What all kernels are told of `given`."""
    q, k, bias, block_mask = given.q, given.k, given.bias, given.block_mask
    batch, queries, heads, dim = q.shape
    rows, changes = row_bounds(given), 0
    alibi = rows if given.alibi_slopes is None else given.alibi_slopes.contiguous()
    for bit, tensor in ((BIAS, bias), (BLOCK_MASK, block_mask), (ALIBI, given.alibi_slopes)):
        changes |= 0 if tensor is None else bit.value
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    mask_strides = bias_strides
    if bias is not None:
        if max(bias.stride()[2:]) >= MAX_STRIDE:
            bias = bias.contiguous()
        bias_strides = bias.expand(batch, heads, -1, -1).stride()
    if block_mask is not None:
        if max(block_mask.stride()[2:]) >= MAX_STRIDE:
            block_mask = block_mask.contiguous()
        mask_strides = block_mask.expand(batch, heads, -1, -1).stride()
    threshold, kept_scale = threshold_and_scale(given.dropout_p)
    told: tuple = (
        *(rows, alibi, rows if bias is None else bias, *bias_strides),
        *(rows if block_mask is None else block_mask, *mask_strides, given.block_size),
        *(queries, k.shape[1], heads, heads // k.shape[2], given.scale, given.scale / math.log(2)),
        *(threshold - 2**31, kept_scale, *seed_words(given.seed), changes, given.softcap, given.dropout_p > 0),
        *(dim, given.v.shape[-1]),
    )
    return Shared(*told)


def placed(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` (B, T, H, D) and its strides by b, t and h; a copy where rows have gaps or lie too far apart."""
    if (x.stride(-1) != 1 and x.shape[-1] != 1) or x.stride(1) >= MAX_STRIDE:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def widths(dim: int, value_dim: int) -> tuple[int, int]:
    """The widths of tiles that hold `dim` and `value_dim` columns: one for both where one of them is not filled, as
    Triton 3.6 then reads outside of shared memory on sm_90 with two."""
    padded = [max(triton.next_power_of_2(size), 16) for size in (dim, value_dim)]
    if padded != [dim, value_dim]:
        padded = [max(padded)] * 2
    return padded[0], padded[1]
