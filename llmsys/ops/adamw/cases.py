"""AdamW: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

# A shape here is the sizes of a list's tensors.
SMALL = ((0,), (1,), (7, 8, 9), (15, 16, 17), (31, 32, 33), (2048, 2049), (63, 64, 65), (1000, 0, 3))
LARGE = ((1 << 25,), (1 << 22, 1 << 11) * 8)
EDGES = ((10_000,) * 100,)
VARIANTS: tuple[dict, ...] = (
    {},
    {"masters": True},
    {"grad_dtype": torch.float32},
    {"grad_dtype": torch.bfloat16, "masters": True, "grad_scale": 0.125},
    {"maximize": True, "step": 1, "lr": 0.1},
    {"weight_decay": 0.0, "eps": 1e-3},
    {"beta1": 0.0, "beta2": 0.5},
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
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    step: int = 10,
    grad_scale: float | None = None,
    maximize: bool = False,
    stochastic_rounding: int | None = None,  # of bfloat16 params
) -> tuple:
    """Forward arguments in schema order: lists of 1-d tensors with `shape[i]` elements, params of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    grad_dtype = dtype if grad_dtype is None or dtype == torch.float64 else grad_dtype
    dtypes, n = (wide, grad_dtype, wide, wide), len(shape)
    tensors = random(seed, device, *(((size,), each) for each in dtypes for size in shape))
    weights, grads, exp_avgs, roots = (tensors[i : i + n] for i in range(0, 4 * n, n))
    return (
        [weight.to(dtype, copy=True) for weight in weights],
        grads,
        exp_avgs,
        [root.square_() for root in roots],
        weights if masters else [],
        *(lr, beta1, beta2, eps, weight_decay, step),
        None if grad_scale is None else torch.tensor(grad_scale, device=device),
        maximize,
        stochastic_rounding if dtype == torch.bfloat16 else None,
    )


def traffic(direction: str, params: list, grads: list, exp_avgs: list, exp_avg_sqs: list, masters: list, *_) -> int:
    """Bytes that must move: states and p in and out, grads in; with masters, params out too."""
    written = (*exp_avgs, *exp_avg_sqs, *(masters or params))
    return 2 * _bytes(written) + _bytes(grads) + (_bytes(params) if masters else 0)


def flops(direction: str, params: list, *_: object) -> int:
    """A scale; decay; three for m, four for v; a root, an addition, a division, a product and a difference."""
    return 14 * sum(param.numel() for param in params)


def _bytes(tensors: list | tuple) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
