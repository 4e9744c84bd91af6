"""Rotary position embedding in Triton: a program rotates heads of a few tokens, each of which reads its row of the
tables once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from llmsys.ops._triton import device_of, load, num_warps, store
from llmsys.ops.rope.native import table_strides, with_whole_rows

TILE = 4096  # elements of x


@triton.jit
def rotate(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    token,
    tokens,
    first_head,
    heads,
    head_dim,
    half,
    x_token_stride,
    x_head_stride,
    y_token_stride,
    y_head_stride,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate BLOCK_HEADS heads of each `token`, (BLOCK_TOKENS, 1, 1); the tables' pointers are at its rows."""
    head = first_head + tl.arange(0, BLOCK_HEADS)[None, :, None]
    inside = (token < tokens) & (head < heads)
    x_ptr += token * x_token_stride + head * x_head_stride
    y_ptr += token * y_token_stride + head * y_head_stride
    i = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask = (token < tokens) & (i < half)
    cos, sin = load(cos_ptr + i, mask), load(sin_ptr + i, mask)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        mask = inside & (d < 2 * half)
        pairs = load(x_ptr + d, mask).reshape(token.shape[0], BLOCK_HEADS, BLOCK_HALF, 2)
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


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    q_heads,
    k_heads,
    head_dim,
    half,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    q_out_batch_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_batch_stride,
    k_out_token_stride,
    k_out_head_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    BOTH: tl.constexpr,  # else there is no k
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
    cos_ptr += sequence * cos_batch_stride + token * cos_token_stride
    sin_ptr += sequence * sin_batch_stride + token * sin_token_stride
    head = tl.program_id(1).to(tl.int64) * BLOCK_HEADS
    q_end = tl.cdiv(q_heads, BLOCK_HEADS) * BLOCK_HEADS
    if not BOTH or head < q_end:
        rotate(
            q_ptr + sequence * q_batch_stride,
            q_out_ptr + sequence * q_out_batch_stride,
            *(cos_ptr, sin_ptr, token, tokens, head, q_heads, head_dim, half),
            *(q_token_stride, q_head_stride, q_out_token_stride, q_out_head_stride),
            *(INTERLEAVED, INVERSE, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST),
        )
    else:
        rotate(
            k_ptr + sequence * k_batch_stride,
            k_out_ptr + sequence * k_out_batch_stride,
            *(cos_ptr, sin_ptr, token, tokens, head - q_end, k_heads, head_dim, half),
            *(k_token_stride, k_head_stride, k_out_token_stride, k_out_head_stride),
            *(INTERLEAVED, INVERSE, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST),
        )


def tile(tokens: int, heads: int, half: int, rest: int) -> tuple[int, int, int, int]:
    """(BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST)"""
    block_half = triton.next_power_of_2(max(half, 1))
    block_rest = triton.next_power_of_2(rest) if rest else 0
    rows = max(TILE // triton.next_power_of_2(2 * block_half + block_rest), 1)
    block_heads = min(triton.next_power_of_2(max(heads, 1)), rows)
    return min(triton.next_power_of_2(tokens), rows // block_heads), block_heads, block_half, block_rest


def launch(
    inputs: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    inverse: bool,
    outputs: Sequence[torch.Tensor] | None,
) -> Sequence[torch.Tensor]:
    """As `llmsys.ops.rope.native.rotate`."""
    inputs = [with_whole_rows(x) for x in inputs]
    cos, sin = with_whole_rows(cos), with_whole_rows(sin)
    if outputs is None:
        outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    if all(x.numel() == 0 for x in inputs):
        return outputs
    q, k, q_out, k_out = inputs[0], inputs[-1], outputs[0], outputs[-1]
    (batch, tokens, q_heads, head_dim), k_heads, half = q.shape, k.shape[2], cos.shape[-1]
    block_tokens, block_heads, block_half, block_rest = tile(tokens, q_heads, half, head_dim - 2 * half)
    both = len(inputs) == 2
    head_blocks = triton.cdiv(q_heads, block_heads) + (triton.cdiv(k_heads, block_heads) if both else 0)
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:-1]]
    with device_of(q):
        rope_kernel[(batch * triton.cdiv(tokens, block_tokens), head_blocks)](
            *(q, k, q_out, k_out, cos, sin, tokens, q_heads, k_heads, head_dim, half, *strides),
            *(*table_strides(cos), *table_strides(sin), both, interleaved, inverse),
            *(block_tokens, block_heads, block_half, block_rest),
            num_warps=num_warps(block_tokens * block_heads * triton.next_power_of_2(2 * block_half + block_rest)),
            enable_fp_fusion=False,  # the same bits, whichever way the compiler lays out the tile
        )
    return outputs


def forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    return launch((x,), cos, sin, interleaved, False, None if out is None else (out,))[0]


def backward(
    dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    return launch((dy,), cos, sin, interleaved, True, None if out is None else (out,))[0]
