"""The dynamic map of 8-bit quantisation, as csrc/dynamic_map.h has it: 256 numbers in order, a code the index of one.

Source: Dettmers et al. 2021, arXiv:2110.02861, section 2.1, with the decades of its code.
"""

from __future__ import annotations

from ctypes import c_float
from functools import cache

import torch

BLOCK = 256  # elements that share a scale: csrc/adamw_8bit.h
SMALLEST_SCALE = 2.0**-126  # its inverse is finite
SIGNED_ZERO = 127  # the code of 0; in the unsigned map it is 0


def numbers(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 256 float32 numbers of the map: in each of seven decades twice as many as in the one below, then 1."""
    return torch.tensor(_numbers(signed), dtype=torch.float32, device=device)


def boundaries(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Halfway between each number and the next, in float64: the code of y is how many of these are <= y."""
    wide = torch.tensor(_numbers(signed), dtype=torch.float64, device=device)
    return (wide[1:] + wide[:-1]) / 2


@cache
def _numbers(signed: bool) -> tuple[float, ...]:
    """As Python's floats, since a tensor made while a graph is traced must not outlive that."""
    positive = []
    for decade in range(7):
        size, power = 2 << decade, 10 ** (6 - decade)
        step = c_float(0.45 / (power * size)).value
        offset = c_float(((0.9 if signed else 0.45) / size - 0.8) / power).value
        positive += [c_float(step * j + offset).value for j in range(2 * size, 4 * size, 4 if signed else 2)]
    lower = [-number for number in reversed(positive)] if signed else []
    return (*lower, 0.0, *positive, 1.0)


def zero_code(signed: bool) -> int:
    return SIGNED_ZERO if signed else 0


def num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def decode(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """The numbers that `codes` stand for, in the dtype of `scales`."""
    found = numbers(signed, codes.device)[codes.flatten().long()].to(scales.dtype)
    return (found * scales.repeat_interleave(BLOCK)[: codes.numel()]).view(codes.shape)


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of `values`: each block's largest magnitude, and the nearest codes.

    A block with a NaN or an infinity has a scale of NaN and only codes of 0.
    """
    flat = values.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = padded.abs().amax(1) if len(padded) else padded.new_zeros(0)
    scales = torch.where(largest.isfinite(), largest.clamp(min=SMALLEST_SCALE), torch.nan)
    ratios = torch.where(largest.isfinite()[:, None], padded / scales[:, None], 0.0)
    thresholds = boundaries(signed, values.device).to(values.dtype)
    codes = torch.searchsorted(thresholds, ratios.flatten(), right=True)[: flat.numel()]
    return codes.to(torch.uint8).view(values.shape), scales
