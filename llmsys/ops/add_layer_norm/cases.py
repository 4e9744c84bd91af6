"""Residual addition and LayerNorm: inputs, sizes, cost."""

from __future__ import annotations

from typing import Any

import torch

from llmsys.ops._cases import random
from llmsys.ops.layer_norm.cases import LARGE, SMALL, VARIANTS, flops, inputs as norm_inputs

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

EDGES = ((4096, 1024), (4096, 4095), (4096, 8192), (4096, 16384), (4096, 16383), (4096, 65536))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, **options: Any) -> tuple:
    """Forward arguments in schema order: those of LayerNorm, with a residual of x's shape."""
    x, *rest = norm_inputs(shape, dtype, device, seed, **options)
    (residual,) = random(500 + seed, device, (shape, dtype))
    return x, residual, *rest


def traffic(direction: str, x: torch.Tensor, *_: object) -> int:
    """Bytes that must move: x and residual in, sum and y out; backward, dy, dsum and sum in, dx out."""
    return 4 * x.numel() * x.element_size()
