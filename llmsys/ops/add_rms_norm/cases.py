"""Residual addition and RMSNorm: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random
from llmsys.ops.rms_norm.cases import LARGE, SMALL, VARIANTS, flops

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

EDGES = ((4096, 1024), (4096, 4095), (4096, 8192), (4096, 16384), (4096, 16383), (4096, 65536))


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    weight_dtype: torch.dtype | None = None,
) -> tuple:
    """Forward arguments in schema order: x and residual of `shape`, weight of its last dimension."""
    if dtype == torch.float64:
        weight_dtype = None
    x, residual, weight = random(seed, device, (shape, dtype), (shape, dtype), (shape[-1:], weight_dtype or dtype))
    return x, residual, weight, eps, weight_offset


def traffic(direction: str, x: torch.Tensor, *_: object) -> int:
    """Bytes that must move: x and residual in, sum and y out; backward, dy, dsum and sum in, dx out."""
    return 4 * x.numel() * x.element_size()
