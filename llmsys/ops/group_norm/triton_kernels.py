"""GroupNorm in Triton: a program for each group of a sample, which lies in one piece in memory, or for several small
ones. What a program has read comes from the L2 cache again: for the variance and for the result.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, store
from llmsys.ops.layer_norm.native import contiguous
from llmsys.ops.layer_norm.triton_kernels import ROUNDED_PRODUCTS, column
from llmsys.ops.rms_norm.triton_kernels import dweight_kernel, dweight_tile

TILE = 8192  # elements that a program holds: 16 warps, since there may be fewer groups than fill a device
SHARED_TILE = 1024  # elements of several small groups that a program holds
MAX_GROUPS = 16


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    groups,
    channels,
    size,
    numel,
    eps,
    BLOCK: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A row is one group of one sample; `channels` and `numel` are its own."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    total = tl.zeros((BLOCK_GROUPS, BLOCK), tl.float32)
    for start in range(0, numel, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        total += load(x_ptr + row * numel + at, (row < rows) & (at < numel))
    mean = tl.sum(total, axis=1, keep_dims=True) / numel
    squares = tl.zeros((BLOCK_GROUPS, BLOCK), tl.float32)
    for start in range(0, numel, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        mask = (row < rows) & (at < numel)
        centred = tl.where(mask, load(x_ptr + row * numel + at, mask) - mean, 0.0)
        squares += centred * centred
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1, keep_dims=True) / numel + eps))
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    row, mean, rstd = row[:, :, None], mean[:, :, None], rstd[:, :, None]
    first = row % groups * channels
    for start_channel in range(0, channels, BLOCK_CHANNELS):
        channel = start_channel + tl.arange(0, BLOCK_CHANNELS)[None, :, None]
        weight = column(weight_ptr, first + channel, first + channels, 1.0)
        bias = column(bias_ptr, first + channel, first + channels, 0.0)
        element = row * numel + channel.to(tl.int64) * size
        for start in range(0, size, BLOCK_SIZE):
            at = start + tl.arange(0, BLOCK_SIZE)[None, None, :]
            mask = (row < rows) & (channel < channels) & (at < size)
            xhat = (load(x_ptr + element + at, mask) - mean) * rstd
            store(y_ptr + element + at, xhat * weight + bias, mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_parts_ptr,
    dbias_parts_ptr,
    rows,
    groups,
    channels,
    size,
    numel,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The parts of dweight and dbias are (samples, channels of all groups)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None, None]
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    first = row % groups * channels
    levels = tl.zeros((BLOCK_GROUPS, BLOCK_CHANNELS, 1), tl.float32)
    dots = tl.zeros((BLOCK_GROUPS, BLOCK_CHANNELS, 1), tl.float32)
    for start_channel in range(0, channels, BLOCK_CHANNELS):
        channel = start_channel + tl.arange(0, BLOCK_CHANNELS)[None, :, None]
        inside = (row < rows) & (channel < channels)
        element = row * numel + channel.to(tl.int64) * size
        sums = tl.zeros((BLOCK_GROUPS, BLOCK_CHANNELS, BLOCK_SIZE), tl.float32)
        products = tl.zeros((BLOCK_GROUPS, BLOCK_CHANNELS, BLOCK_SIZE), tl.float32)
        for start in range(0, size, BLOCK_SIZE):
            at = start + tl.arange(0, BLOCK_SIZE)[None, None, :]
            dy = load(dy_ptr + element + at, inside & (at < size))
            xhat = (load(x_ptr + element + at, inside & (at < size)) - mean) * rstd
            sums += dy
            products += dy * xhat
        dbias = tl.sum(sums, axis=2, keep_dims=True)
        dweight = tl.sum(products, axis=2, keep_dims=True)
        tl.store(dbias_parts_ptr + row * channels + channel, dbias, mask=inside)
        tl.store(dweight_parts_ptr + row * channels + channel, dweight, mask=inside)
        weight = column(weight_ptr, first + channel, first + channels, 1.0)
        levels += dbias * weight
        dots += dweight * weight
    level = tl.sum(levels, axis=1, keep_dims=True) / numel
    along = tl.sum(dots, axis=1, keep_dims=True) / numel
    for start_channel in range(0, channels, BLOCK_CHANNELS):
        channel = start_channel + tl.arange(0, BLOCK_CHANNELS)[None, :, None]
        weight = column(weight_ptr, first + channel, first + channels, 1.0)
        element = row * numel + channel.to(tl.int64) * size
        for start in range(0, size, BLOCK_SIZE):
            at = start + tl.arange(0, BLOCK_SIZE)[None, None, :]
            mask = (row < rows) & (channel < channels) & (at < size)
            xhat = (load(x_ptr + element + at, mask) - mean) * rstd
            dx = (load(dy_ptr + element + at, mask) * weight - level - xhat * along) * rstd
            store(dx_ptr + element + at, dx, mask)


def tile(channels: int, size: int) -> tuple[int, int, int]:
    """(BLOCK_GROUPS, BLOCK_CHANNELS, BLOCK_SIZE): a channel whole where it fits, and as many as then do. How
    many samples there are makes no difference, to the order of sums neither."""
    block_size = min(triton.next_power_of_2(size), TILE)
    block_channels = min(triton.next_power_of_2(channels), TILE // block_size)
    together = max(SHARED_TILE // (block_channels * block_size), 1)
    return min(together, MAX_GROUPS), block_channels, block_size


def warps(blocks: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Warps for a tile: 16 bytes per thread where they reach, since each element of an odd channel has its address."""
    return num_warps(math.prod(blocks) * dtype.itemsize)


def forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = contiguous_like(x) if out is None else out
    x, weight, bias = x.contiguous(), contiguous(weight), contiguous(bias)
    samples, channels, size = x.shape[0], x.shape[1] // num_groups, x.shape[2:].numel()
    mean, rstd = (torch.empty(samples, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if samples:
        rows = samples * num_groups
        block, blocks = min(triton.next_power_of_2(channels * size), TILE), tile(channels, size)
        with device_of(x):
            forward_kernel[(triton.cdiv(rows, blocks[0]),)](
                x, weight, bias, y, mean, rstd, rows, num_groups, channels, size, channels * size, eps,
                block, *blocks, num_warps=warps(blocks, x.dtype),
            )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    dx = contiguous_like(x) if out is None else out
    dy, x, mean, rstd = dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    weight, bias = contiguous(weight), contiguous(bias)
    samples, channels, size = x.shape[0], x.shape[1] // num_groups, x.shape[2:].numel()
    dweight, dbias = (None if p is None else torch.zeros_like(p) for p in (weight, bias))
    if samples == 0:
        return dx, dweight, dbias
    parts = [torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2)]
    rows = samples * num_groups
    blocks = tile(channels, size)
    with device_of(x):
        backward_kernel[(triton.cdiv(rows, blocks[0]),)](
            dy, x, weight, mean, rstd, dx, *parts, rows, num_groups, channels, size, channels * size,
            *blocks, num_warps=warps(blocks, x.dtype), **ROUNDED_PRODUCTS,
        )  # fmt: skip
        block_samples, block_dim = dweight_tile(x.shape[1])
        for part, total in zip(parts, (dweight, dbias), strict=True):
            if total is not None:
                dweight_kernel[(triton.cdiv(x.shape[1], block_dim),)](
                    part, total, samples, x.shape[1], block_samples, block_dim,
                    num_warps=num_warps(block_samples * block_dim),
                )  # fmt: skip
    return dx, dweight, dbias
