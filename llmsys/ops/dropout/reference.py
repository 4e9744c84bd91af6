"""Dropout in plain PyTorch."""

from __future__ import annotations

import math

import torch

from llmsys.ops._philox import random_words


def forward(x: torch.Tensor, p: float, seed: int, offset: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """y: see `llmsys.dropout`."""
    threshold, scale = threshold_and_scale(p)
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = random_words(seed, offset, x.numel(), x.device).view(x.shape) >= threshold
    y = torch.where(kept, x.to(wide) * scale, 0.0).to(x.dtype).contiguous()
    return y if out is None else out.copy_(y)


def backward(dy: torch.Tensor, p: float, seed: int, offset: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """dx: dropped where y was."""
    return forward(dy, p, seed, offset, out)


def threshold_and_scale(p: float) -> tuple[int, float]:
    """The least word that is kept, up to 2³², and what is kept is multiplied by."""
    return math.ceil(p * 2**32), 1 / (1 - p) if p < 1 else 0.0
