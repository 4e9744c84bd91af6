"""Linear: inputs, sizes, cost."""

from __future__ import annotations

import math

import torch

from llmsys.ops._cases import random

SMALL = (
    *((0, 8), (1, 1), (3, 7), (2, 3, 15), (6, 16), (7, 17)),
    *((29, 65), (13, 300), (5, 129), (33, 32), (2, 5, 31)),
)
LARGE = ((66, 4096), (132, 4096), (510, 4096), (2046, 4096), (1, 4096))
VARIANTS: tuple[dict, ...] = (
    {},
    {"out_features": 5, "bias": True},
    {"out_features": 70, "residual": True},
    *({"out_features": 19, "bias": True, "activation": name, "residual": True} for name in ("relu", "gelu")),
    *({"out_features": 37, "activation": name} for name in ("silu", "gelu_tanh")),
)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    out_features: int | None = None,
    bias: bool = False,
    activation: str | None = None,
    residual: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str | None, torch.Tensor | None]:
    """Forward arguments in schema order: x of `shape`, weight (out_features, shape[-1]), square where not said, scaled
    so that x·weightᵀ has the variance of x."""
    width = shape[-1] if out_features is None else out_features
    x, weight, bias_, residual_ = random(
        *(seed, device, (shape, dtype), ((width, shape[-1]), torch.float64), ((width,), dtype)),
        ((*shape[:-1], width), dtype),
    )
    weight = (weight / math.sqrt(max(shape[-1], 1))).to(dtype)
    return x, weight, bias_ if bias else None, activation, residual_ if residual else None


def traffic(direction: str, x: torch.Tensor, weight: torch.Tensor, *rest: object) -> int:
    """Bytes that must move, of x, weight and y; backward, of dy, x, weight, dx and dweight."""
    y = x.numel() // max(x.shape[-1], 1) * weight.shape[0]
    elements = x.numel() + weight.numel() + y if direction == "forward" else 2 * x.numel() + 2 * weight.numel() + y
    return elements * x.element_size()


def flops(direction: str, x: torch.Tensor, weight: torch.Tensor, *rest: object) -> int:
    """A product and a sum for each element of x and row of weight; backward, as much for dx and again for dweight."""
    return {"forward": 2, "backward": 4}[direction] * x.numel() * weight.shape[0]
