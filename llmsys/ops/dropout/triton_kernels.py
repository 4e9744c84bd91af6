"""Dropout in Triton: pointwise over flat tiles, four elements to a counter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._native import rows_of
from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, random_words, seed_words, store
from llmsys.ops.dropout.reference import threshold_and_scale

TILE = 4096


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset"])
def dropout_kernel(
    x_ptr,
    y_ptr,
    size,
    dim,
    x_stride,
    seed_low,
    seed_high,
    offset,
    threshold,
    scale,
    CONTIGUOUS: tl.constexpr,
    SKIP: tl.constexpr,  # offset % 4
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    mask = i < size
    words = random_words(seed_low, seed_high, offset - SKIP + first, SKIP, BLOCK)
    x = load(x_ptr + (i if CONTIGUOUS else i // dim * x_stride + i % dim), mask)
    # The threshold comes with its highest bit flipped, as a signed number, and so does each word.
    kept = (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
    store(y_ptr + i, tl.where(kept, x * scale, 0.0), mask)


def forward(x: torch.Tensor, p: float, seed: int, offset: int, out: torch.Tensor | None = None) -> torch.Tensor:
    x, x_stride = rows_of(x)
    y = contiguous_like(x) if out is None else out
    threshold, scale = threshold_and_scale(p)
    if threshold == 2**32:  # no word is as large
        return y.zero_()
    if y.numel() == 0:
        return y
    with device_of(x):
        dropout_kernel[(triton.cdiv(x.numel(), TILE),)](
            *(x, y, x.numel(), x.shape[-1], x_stride, *seed_words(seed), offset),
            *(threshold - 2**31, scale, x.is_contiguous(), offset % 4, TILE),
            num_warps=num_warps(TILE),
        )
    return y


backward = forward
