"""Stochastic gradient descent: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

# A shape here is the sizes of a list's tensors.
SMALL = ((0,), (1,), (7, 8, 9), (15, 16, 17), (2048, 2049), (63, 64, 65), (1000, 0, 3))
LARGE = ((1 << 25,), (1 << 22, 1 << 11) * 8)
VARIANTS: tuple[dict, ...] = (
    {},
    {"momentum": 0.0, "masters": True},
    {"nesterov": True, "masters": True},
    {"dampening": 0.3, "grad_dtype": torch.float32},
    {"dampening": 0.3, "step": 1, "maximize": True},
    {"weight_decay": 0.0, "grad_scale": 0.125},
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
    lr: float = 0.05,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 0.1,
    nesterov: bool = False,
    step: int = 10,
    grad_scale: float | None = None,
    maximize: bool = False,
    stochastic_rounding: int | None = None,  # of bfloat16 params
) -> tuple:
    """Forward arguments in schema order: lists of 1-d tensors with `shape[i]` elements, params of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    grad_dtype = dtype if grad_dtype is None or dtype == torch.float64 else grad_dtype
    n = len(shape)
    tensors = random(seed, device, *(((size,), each) for each in (wide, grad_dtype, wide) for size in shape))
    weights, grads, buffers = (tensors[i : i + n] for i in range(0, 3 * n, n))
    return (
        [weight.to(dtype, copy=True) for weight in weights],
        grads,
        buffers if momentum else [],
        weights if masters else [],
        *(lr, momentum, dampening, weight_decay, nesterov, step),
        None if grad_scale is None else torch.tensor(grad_scale, device=device),
        maximize,
        stochastic_rounding if dtype == torch.bfloat16 else None,
    )


def traffic(direction: str, params: list, grads: list, buffers: list, masters: list, *_: object) -> int:
    """Bytes that must move: buffers and p in and out, grads in; with masters, params out too."""
    return 2 * _bytes([*buffers, *(masters or params)]) + _bytes(grads) + (_bytes(params) if masters else 0)


def flops(direction: str, params: list, *_: object) -> int:
    """A scale; two for weight decay, three for the buffer, two for the weight."""
    return 8 * sum(param.numel() for param in params)


def _bytes(tensors: list) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
