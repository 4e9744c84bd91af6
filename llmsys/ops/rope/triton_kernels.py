"""Rotary position embedding in Triton: a program rotates heads of a few tokens, each of which reads its row of the
tables once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._triton import device_of, load, num_warps, store
from llmsys.ops.rope.native import table_strides, with_whole_rows

TILE = 4096  # elements of x


@triton.jit
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    tokens,
    heads,
    head_dim,
    half,
    x_batch_stride,
    x_token_stride,
    x_head_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    program = tl.program_id(0).to(tl.int64)
    sequence = program // blocks
    token = program % blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None, None]
    head = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[None, :, None]
    inside = (token < tokens) & (head < heads)
    x_ptr += sequence * x_batch_stride + token * x_token_stride + head * x_head_stride
    y_ptr += ((sequence * tokens + token) * heads + head) * head_dim
    i = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask = (token < tokens) & (i < half)
    cos = load(cos_ptr + sequence * cos_batch_stride + token * cos_token_stride + i, mask)
    sin = load(sin_ptr + sequence * sin_batch_stride + token * sin_token_stride + i, mask)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        mask = inside & (d < 2 * half)
        pairs = load(x_ptr + d, mask).reshape(BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, 2)
        a, b = tl.split(pairs)
        store(y_ptr + d, tl.interleave(a * cos - b * sin, b * cos + a * sin), mask)
    else:
        mask = inside & (i < half)
        a, b = load(x_ptr + i, mask), load(x_ptr + half + i, mask)
        store(y_ptr + i, a * cos - b * sin, mask)
        store(y_ptr + half + i, b * cos + a * sin, mask)
    if BLOCK_REST > 0:
        d = 2 * half + tl.arange(0, BLOCK_REST)[None, None, :]
        mask = inside & (d < head_dim)
        tl.store(y_ptr + d, tl.load(x_ptr + d, mask=mask), mask=mask)


def tile(tokens: int, heads: int, half: int, rest: int) -> tuple[int, int, int, int]:
    """(BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST)"""
    block_half = triton.next_power_of_2(max(half, 1))
    block_rest = triton.next_power_of_2(rest) if rest else 0
    rows = max(TILE // triton.next_power_of_2(2 * block_half + block_rest), 1)
    block_heads = min(triton.next_power_of_2(heads), rows)
    return min(triton.next_power_of_2(tokens), rows // block_heads), block_heads, block_half, block_rest


def launch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool, out: torch.Tensor | None
) -> torch.Tensor:
    x, cos, sin = with_whole_rows(x), with_whole_rows(cos), with_whole_rows(sin)
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if y.numel() == 0:
        return y
    (batch, tokens, heads, head_dim), half = x.shape, cos.shape[-1]
    block_tokens, block_heads, block_half, block_rest = tile(tokens, heads, half, head_dim - 2 * half)
    strides = (*x.stride()[:-1], *table_strides(cos), *table_strides(sin))
    with device_of(x):
        rope_kernel[(batch * triton.cdiv(tokens, block_tokens), triton.cdiv(heads, block_heads))](
            *(x, cos, sin, y, tokens, heads, head_dim, half, *strides),
            *(interleaved, inverse, block_tokens, block_heads, block_half, block_rest),
            num_warps=num_warps(block_tokens * block_heads * triton.next_power_of_2(2 * block_half + block_rest)),
        )
    return y


def forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    return launch(x, cos, sin, interleaved, False, out)


def backward(
    dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    return launch(dy, cos, sin, interleaved, True, out)
