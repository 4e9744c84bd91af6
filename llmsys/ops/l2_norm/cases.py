"""Rows of length one: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random
from llmsys.ops.rms_norm.cases import LARGE, SMALL

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

EDGES = ((65536, 64), (65536, 128), (4096, 4095), (4096, 8192), (4096, 16383), (4096, 65536), (1, 1))
VARIANTS: tuple[dict, ...] = ({}, {"eps": 8.0})  # rows of up to 64 standard normal numbers are shorter


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, eps: float = 1e-12
) -> tuple:
    """Forward arguments in schema order: x of `shape`."""
    (x,) = random(seed, device, (shape, dtype))
    return x, eps


def traffic(direction: str, x: torch.Tensor, *_: object) -> int:
    """Bytes that must move: x in and y out; backward, dy and x in and dx out."""
    return {"forward": 2, "backward": 3}[direction] * x.numel() * x.element_size()


def flops(direction: str, x: torch.Tensor, *_: object) -> int:
    """Forward: square, add, scale. Backward: product, add, two scalings and their difference."""
    return {"forward": 3, "backward": 5}[direction] * x.numel()
