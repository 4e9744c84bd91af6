"""GroupNorm: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random
from llmsys.ops.layer_norm.cases import flops, traffic

__all__ = ["EDGES", "LARGE", "SMALL", "VARIANTS", "flops", "inputs", "shape", "traffic"]

SMALL = (
    (0, 4, 8),
    (1, 1, 1),
    (2, 6),
    (3, 4, 7),
    (2, 2, 3, 15),
    (5, 2, 16),
    (2, 4, 17),
    (3, 6, 31),
    (2, 32, 5, 5),
    (2, 64, 3),
    (3, 4, 8, 9),
    (2, 4, 129),
    (2, 6, 33),
)
LARGE = ((8, 512, 64, 64), (2, 512, 64, 64), (2, 320, 96, 96))
EDGES = ((8, 512, 7, 7), (8, 512, 1), (8, 96, 16384))
VARIANTS: tuple[dict, ...] = (
    {},
    {"weight_dtype": torch.float32},
    {"has_bias": False},
    {"has_weight": False},
    {"has_weight": False, "has_bias": False},
    {"eps": 1e-2},
    {"offset": 300.0},
    {"num_groups": 1},
)


def shape(*size: int) -> tuple[int, ...]:
    """(..., D) as (N, C, ...) with four channels."""
    return size[0], 4, *size[1:]


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    eps: float = 1e-5,
    num_groups: int | None = None,
    has_weight: bool = True,
    has_bias: bool = True,
    weight_dtype: torch.dtype | None = None,
    offset: float = 0.0,
) -> tuple:
    """Forward arguments in schema order: x of `shape`, its elements around `offset`; weight, bias of its channels.

    Of 32, 2 or 1 groups the most that divide the channels, where `num_groups` is not given.
    """
    if dtype == torch.float64 or weight_dtype is None:
        weight_dtype = dtype
    channels = (shape[1:2], weight_dtype)
    x, weight, bias = random(seed, device, (shape, dtype), channels, channels)
    num_groups = num_groups or next(groups for groups in (32, 2, 1) if shape[1] % groups == 0)
    return x + offset, num_groups, weight if has_weight else None, bias if has_bias else None, eps
