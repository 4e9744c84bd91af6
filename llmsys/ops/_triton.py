"""What the Triton kernels of all ops share: loads and stores around arithmetic in float32, and the size of a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from llmsys import env

# Triton 3.7's interpreter truncates float32 to bfloat16 where the compiled kernel rounds to nearest even, and loses
# bfloat16 subnormals. There, and only there, both conversions are done on the bits.
INTERPRETED = tl.constexpr(env.triton_interpreted())


@triton.jit
def to_float32(value):
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """The float32 `value` in `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits >> 16) | 0x40
        return tl.where(value == value, nearest, nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def load(pointer, mask):
    return to_float32(tl.load(pointer, mask=mask, other=0.0))


@triton.jit
def store(pointer, value, mask):
    tl.store(pointer, rounded(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def row_start(row, inner, stride, outer_stride):
    """Where rows at two distances start, as `llmsys.ops._native.grouped_rows` gives them."""
    start = row * outer_stride
    if inner != 1:  # 1 is a constant to the compiler
        start = row // inner * outer_stride + row % inner * stride
    return start


@triton.jit
def philox(seed_low, seed_high, counter):
    """The four words of each 64-bit `counter`, as uint32: see `llmsys.ops._philox`."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    key0, key1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    return philox_impl(c0, c1, c0 * 0, c0 * 0, key0, key1)


@triton.jit
def random_words(seed_low, seed_high, first, SKIP: tl.constexpr, SIZE: tl.constexpr):
    """The words of elements first + SKIP, …, first + SKIP + SIZE - 1; `first` is a multiple of 4, SKIP below 4."""
    if SKIP == 0:
        w0, w1, w2, w3 = philox(seed_low, seed_high, first // 4 + tl.arange(0, SIZE // 4))
        return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:  # every element has its counter's words and takes one
        element = first + SKIP + tl.arange(0, SIZE)
        w0, w1, w2, w3 = philox(seed_low, seed_high, element // 4)
        word = (element % 4).to(tl.int32)
        # By masks: Triton 3.7.1 cannot select among four for gfx942 (LLVM: "node should have been selected").
        low = (w0 & -(word == 0).to(tl.int32)) | (w1 & -(word == 1).to(tl.int32))
        high = (w2 & -(word == 2).to(tl.int32)) | (w3 & -(word == 3).to(tl.int32))
        return low | high


@triton.jit
def store_stochastic(pointer, value, seed_low, seed_high, first, mask, SIZE: tl.constexpr):
    """Write the float32 `value` as bfloat16, up or down at random, by the words from `first` on, a multiple of 4: see
    `llmsys.ops._stochastic`."""
    bits = value.to(tl.uint32, bitcast=True)
    moved = bits + (random_words(seed_low, seed_high, first, 0, SIZE) >> 16)
    upper = tl.where(value == value, moved, bits | 0x400000) >> 16  # adding could make a NaN infinite
    tl.store(pointer, upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)


def seed_words(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits, each as a number that Triton takes for an int32."""
    return (seed + 2**31) % 2**32 - 2**31, ((seed >> 32) + 2**31) % 2**32 - 2**31


def contiguous_like(x: torch.Tensor) -> torch.Tensor:
    """An output for the shape of `x`, whatever its strides."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device; this makes it the one of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def architecture(device: torch.device) -> str:
    """The first GPU with the instructions and at least the shared memory that tiles for `device` may be chosen for:
    "sm_80", "sm_90" or "gfx942"."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"  # sm_120 has less


def num_warps(elements: int) -> int:
    """Warps for a tile: 16 elements per thread of an NVIDIA warp, which is two 16-byte loads of bfloat16."""
    return min(max(elements // 512, 1), 16)
