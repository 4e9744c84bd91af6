"""LayerNorm: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random
from llmsys.ops.rms_norm.cases import LARGE, SMALL

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]

EDGES = ((4096, 128), (4096, 1024), (4096, 4095), (4096, 8192), (4096, 16384), (4096, 16383), (1, 1))
VARIANTS: tuple[dict, ...] = (
    {},
    {"weight_dtype": torch.float32},
    {"has_bias": False},
    {"has_weight": False},
    {"has_weight": False, "has_bias": False},
    {"eps": 1e-2},
    {"offset": 300.0},
)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    eps: float = 1e-5,
    has_weight: bool = True,
    has_bias: bool = True,
    weight_dtype: torch.dtype | None = None,
    offset: float = 0.0,
) -> tuple:
    """Forward arguments in schema order: x of `shape`, its rows around `offset`; weight, bias of its last dimension."""
    if dtype == torch.float64 or weight_dtype is None:
        weight_dtype = dtype
    columns = (shape[-1:], weight_dtype)
    x, weight, bias = random(seed, device, (shape, dtype), columns, columns)
    return x + offset, weight if has_weight else None, bias if has_bias else None, eps


def traffic(direction: str, x: torch.Tensor, *_: object) -> int:
    """Bytes that must move: x in and y out; backward, dy and x in and dx out. Weight and bias stay in cache."""
    return {"forward": 2, "backward": 3}[direction] * x.numel() * x.element_size()


def flops(direction: str, x: torch.Tensor, *_: object) -> int:
    """Forward: an addition, a distance squared and added, a distance scaled twice and added. Backward: fifteen (xhat,
    two sums, dx, dweight, dbias)."""
    return {"forward": 8, "backward": 15}[direction] * x.numel()
