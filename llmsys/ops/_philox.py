"""Philox-4x32-10 in plain PyTorch: random words from a seed and a counter, so that nothing need be stored.

Element i takes word i % 4 of counter i // 4. csrc/cpu/philox.h and `_triton.random_words` make the same words.

Source     Salmon et al. 2011, doi:10.1145/2063384.2063405, section 3.3 and table 2
"""

from __future__ import annotations

from typing import TypeVar

import torch

Word = TypeVar("Word", torch.Tensor, int)

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF


def philox(words: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """The four words of each counter, 32 bits each in int64 or int; `words` are the counter's own, lowest first."""
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def random_words(seed: int, first: int, size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The words of elements first, …, first + size - 1, each in [0, 2³²), as int64."""
    counters = torch.arange(first // 4, -(-(first + size) // 4), device=device)
    zero = torch.zeros_like(counters)
    words = philox((counters & LOW, counters >> 32, zero, zero), (seed & LOW, seed >> 32 & LOW))
    return torch.stack(words, -1).flatten()[first % 4 : first % 4 + size]


def _product(word: Word, multiplier: int) -> tuple[Word, Word]:
    """The high and the low half of the 64-bit product of two 32-bit numbers: int64 alone would overflow."""
    low = (word & 0xFFFF) * multiplier
    high = (word >> 16) * multiplier + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
