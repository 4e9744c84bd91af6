"""Lion: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

# A shape here is the sizes of a list's tensors.
SMALL = ((0,), (1,), (7, 8, 9), (15, 16, 17), (2048, 2049), (63, 64, 65), (1000, 0, 3))
LARGE = ((1 << 25,), (1 << 22, 1 << 11) * 8)
VARIANTS: tuple[dict, ...] = (
    {},
    {"masters": True},
    {"grad_dtype": torch.float32, "maximize": True},
    {"grad_dtype": torch.bfloat16, "masters": True, "grad_scale": 0.125},
    {"weight_decay": 0.0, "beta1": 0.5, "lr": 0.1},
    {"stochastic_rounding": -(2**33) - 5},
)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    grad_dtype: torch.dtype | None = None,
    masters: bool = False,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.1,
    grad_scale: float | None = None,
    maximize: bool = False,
    stochastic_rounding: int | None = None,  # of bfloat16 params
) -> tuple:
    """Forward arguments in schema order: lists of 1-d tensors with `shape[i]` elements, params of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    grad_dtype = dtype if grad_dtype is None or dtype == torch.float64 else grad_dtype
    n = len(shape)
    tensors = random(seed, device, *(((size,), each) for each in (wide, grad_dtype, wide) for size in shape))
    weights, grads, exp_avgs = (tensors[i : i + n] for i in range(0, 3 * n, n))
    return (
        [weight.to(dtype, copy=True) for weight in weights],
        grads,
        exp_avgs,
        weights if masters else [],
        *(lr, beta1, beta2, weight_decay),
        None if grad_scale is None else torch.tensor(grad_scale, device=device),
        maximize,
        stochastic_rounding if dtype == torch.bfloat16 else None,
    )


def traffic(direction: str, params: list, grads: list, exp_avgs: list, masters: list, *_: object) -> int:
    """Bytes that must move: moments and p in and out, grads in; with masters, params out too."""
    return 2 * _bytes([*exp_avgs, *(masters or params)]) + _bytes(grads) + (_bytes(params) if masters else 0)


def flops(direction: str, params: list, *_: object) -> int:
    """A scale; three each for the direction and the moment; three for the weight."""
    return 10 * sum(param.numel() for param in params)


def _bytes(tensors: list) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
