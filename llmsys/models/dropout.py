"""Dropout whose masks do not depend on the layout: on who holds which tokens, heads, blocks or microbatches.

A mask is a function of the place of each element in the whole tensor, of the module's name, and of a key, which is that
of seed, step and microbatch.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from llmsys.ops import dropout


class PlacedDropout(nn.Module):
    """Dropout of (B, T, D) with probability `p` in training. `name` is its own in the model.

    sequence_part   which of how many equal parts of the sequence x is. Who cuts sequences says it here
    """

    def __init__(self, p: float):
        super().__init__()
        self.p, self.name, self.sequence_part = p, "", (0, 1)

    def forward(self, x_BTD: Tensor, key: int | None) -> Tensor:
        if key is None or not self.active:
            return x_BTD
        seed, (part, parts) = derived(key, self.name), self.sequence_part
        if parts == 1:
            return dropout(x_BTD, self.p, seed=seed)
        size = x_BTD[0].numel()
        rows = [dropout(x, self.p, seed=seed, offset=(row * parts + part) * size) for row, x in enumerate(x_BTD)]
        return torch.stack(rows)

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def extra_repr(self) -> str:
        return f"p={self.p}"


def derived(*what: int | str) -> int:
    """A seed of 64 bits from numbers and names."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode()).digest()[:8], "little", signed=True)
