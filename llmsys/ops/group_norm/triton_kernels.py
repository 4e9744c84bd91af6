"""GroupNorm in Triton: one program per sample and group, by tiles of channels × elements. A group is read again from
the L2 cache: for the variance and for the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, store
from llmsys.ops.layer_norm.native import contiguous
from llmsys.ops.rms_norm.triton_kernels import dweight_kernel, dweight_tile

TILE = 4096  # elements a program holds


@triton.jit
def per_channel(pointer, channel, inside, otherwise):
    """A weight or a bias of some channels: `otherwise` where there is none."""
    if pointer is None:
        return otherwise
    else:
        return load(pointer + channel, inside)


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    groups,
    channels,
    size,
    eps,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """`channels` are those of one group."""
    group = tl.program_id(0).to(tl.int64)
    x_ptr += group * channels * size
    y_ptr += group * channels * size
    first_channel = (group % groups) * channels
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_SIZE), tl.float32)
    for c in range(0, channels, BLOCK_CHANNELS):
        channel = c + tl.arange(0, BLOCK_CHANNELS)[:, None]
        for s in range(0, size, BLOCK_SIZE):
            at = s + tl.arange(0, BLOCK_SIZE)[None, :]
            total += load(x_ptr + channel * size + at, (channel < channels) & (at < size))
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / (channels * size)
    squares = tl.zeros((BLOCK_CHANNELS, BLOCK_SIZE), tl.float32)
    for c in range(0, channels, BLOCK_CHANNELS):
        channel = c + tl.arange(0, BLOCK_CHANNELS)[:, None]
        for s in range(0, size, BLOCK_SIZE):
            at = s + tl.arange(0, BLOCK_SIZE)[None, :]
            mask = (channel < channels) & (at < size)
            centred = tl.where(mask, load(x_ptr + channel * size + at, mask) - mean, 0.0)
            squares += centred * centred
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / (channels * size)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, rstd)
    for c in range(0, channels, BLOCK_CHANNELS):
        channel = c + tl.arange(0, BLOCK_CHANNELS)[:, None]
        weight = per_channel(weight_ptr, first_channel + channel, channel < channels, 1.0)
        bias = per_channel(bias_ptr, first_channel + channel, channel < channels, 0.0)
        for s in range(0, size, BLOCK_SIZE):
            at = s + tl.arange(0, BLOCK_SIZE)[None, :]
            mask = (channel < channels) & (at < size)
            x = load(x_ptr + channel * size + at, mask)
            store(y_ptr + channel * size + at, (x - mean) * rstd * weight + bias, mask)


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
    groups,
    channels,
    size,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    dy_ptr += group * channels * size
    x_ptr += group * channels * size
    dx_ptr += group * channels * size
    first_channel = (group % groups) * channels
    mean = tl.load(mean_ptr + group)
    rstd = tl.load(rstd_ptr + group)
    levels = tl.zeros((BLOCK_CHANNELS, 1), tl.float32)
    dots = tl.zeros((BLOCK_CHANNELS, 1), tl.float32)
    for c in range(0, channels, BLOCK_CHANNELS):
        channel = c + tl.arange(0, BLOCK_CHANNELS)[:, None]
        dweight = tl.zeros((BLOCK_CHANNELS, BLOCK_SIZE), tl.float32)
        dbias = tl.zeros((BLOCK_CHANNELS, BLOCK_SIZE), tl.float32)
        for s in range(0, size, BLOCK_SIZE):
            at = s + tl.arange(0, BLOCK_SIZE)[None, :]
            mask = (channel < channels) & (at < size)
            dy = load(dy_ptr + channel * size + at, mask)
            dbias += dy
            dweight += dy * ((load(x_ptr + channel * size + at, mask) - mean) * rstd)
        of_weight = tl.sum(dweight, axis=1, keep_dims=True)
        of_bias = tl.sum(dbias, axis=1, keep_dims=True)
        tl.store(dweight_parts_ptr + group * channels + channel, of_weight, mask=channel < channels)
        tl.store(dbias_parts_ptr + group * channels + channel, of_bias, mask=channel < channels)
        weight = per_channel(weight_ptr, first_channel + channel, channel < channels, 1.0)
        levels += of_bias * weight
        dots += of_weight * weight
    level = tl.sum(tl.sum(levels, axis=1), axis=0) / (channels * size)
    along = tl.sum(tl.sum(dots, axis=1), axis=0) / (channels * size)
    for c in range(0, channels, BLOCK_CHANNELS):
        channel = c + tl.arange(0, BLOCK_CHANNELS)[:, None]
        weight = per_channel(weight_ptr, first_channel + channel, channel < channels, 1.0)
        for s in range(0, size, BLOCK_SIZE):
            at = s + tl.arange(0, BLOCK_SIZE)[None, :]
            mask = (channel < channels) & (at < size)
            dy = load(dy_ptr + channel * size + at, mask)
            xhat = (load(x_ptr + channel * size + at, mask) - mean) * rstd
            store(dx_ptr + channel * size + at, (dy * weight - level - xhat * along) * rstd, mask)


def tile(channels: int, size: int) -> tuple[int, int]:
    """(BLOCK_CHANNELS, BLOCK_SIZE): a channel whole where it fits, and as many as then do."""
    block_size = min(triton.next_power_of_2(size), TILE)
    return min(triton.next_power_of_2(channels), TILE // block_size), block_size


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
    block = tile(channels, size)
    if samples:
        with device_of(x):
            forward_kernel[(samples * num_groups,)](
                x, weight, bias, y, mean, rstd, num_groups, channels, size, eps, *block,
                num_warps=num_warps(block[0] * block[1]),
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
    dy, x, weight, bias = dy.contiguous(), x.contiguous(), contiguous(weight), contiguous(bias)
    samples, channels, size = x.shape[0], x.shape[1] // num_groups, x.shape[2:].numel()
    dweight, dbias = (None if p is None else torch.zeros_like(p) for p in (weight, bias))
    parts = [torch.empty(*x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2)]
    block = tile(channels, size)
    if samples == 0:
        return dx, dweight, dbias
    with device_of(x):
        backward_kernel[(samples * num_groups,)](
            dy, x, weight, mean, rstd, dx, *parts, num_groups, channels, size, *block,
            num_warps=num_warps(block[0] * block[1]),
        )  # fmt: skip
        block_samples, block_dim = dweight_tile(x.shape[1])
        for part, total in zip(parts, (dweight, dbias), strict=True):
            if total is not None:
                dweight_kernel[(triton.cdiv(x.shape[1], block_dim),)](
                    part, total, samples, x.shape[1], block_samples, block_dim,
                    num_warps=num_warps(block_samples * block_dim),
                )  # fmt: skip
    return dx, dweight, dbias
