"""Softmax of rows: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random
from llmsys.ops.rms_norm.cases import LARGE, SMALL

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

EDGES = ((65536, 64), (65536, 128), (4096, 4095), (4096, 8192), (4096, 16383), (4096, 65536), (1, 1))
VARIANTS: tuple[dict, ...] = ({}, {"spread": 30.0}, {"masked": True})


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    spread: float = 1.0,  # 30: the small ones are subnormal, or 0
    masked: bool = False,  # every third is -inf, as attention hides keys
) -> tuple[torch.Tensor]:
    """Forward arguments in schema order: x of `shape`."""
    (x,) = random(seed, device, (shape, dtype))
    x = x * spread
    if masked:
        x[..., 1::3] = float("-inf")
    return (x,)


def traffic(direction: str, x: torch.Tensor) -> int:
    """Bytes that must move: x in and y out; backward, dy and y in and dx out."""
    return {"forward": 2, "backward": 3}[direction] * x.numel() * x.element_size()


def flops(direction: str, x: torch.Tensor) -> int:
    """Forward: difference, exponential, sum, scale. Backward: product, sum, difference, product."""
    return 4 * x.numel()
