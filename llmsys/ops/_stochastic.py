"""Stochastic rounding to bfloat16, so that a parameter moves in the mean by updates too small to move it once.

A number between two neighbouring bfloat16 becomes one or the other at random, the farther one the less likely: its
mean is the number itself. Element i of a list of tensors takes the upper half of word i of `_philox`; each tensor's
elements, in row-major order, begin at a multiple of UNIT. csrc/cpu/list_update.h and `_triton.store_stochastic` do the
same.

Source     Gupta et al. 2015, arXiv:1502.02551, section 3.1
"""

from __future__ import annotations

from itertools import accumulate

import torch

from llmsys.ops._philox import random_words

UNIT = 64


def first_elements(tensors: list[torch.Tensor]) -> list[int]:
    """The number of each tensor's first element among those of the list."""
    units = accumulate((-(-tensor.numel() // UNIT) for tensor in tensors), initial=0)
    return [unit * UNIT for unit in units][:-1]


def rounded(value: torch.Tensor, seed: int, first: int) -> torch.Tensor:
    """The float32 `value` in bfloat16, by the words of `seed` from `first` on."""
    words = random_words(seed, first, value.numel(), value.device).view(value.shape)
    moved = (value.view(torch.int32) + (words >> 16).int()) & -0x10000
    return torch.where(value.isnan(), value, moved.view(torch.float32)).bfloat16()  # adding could make NaN infinite
