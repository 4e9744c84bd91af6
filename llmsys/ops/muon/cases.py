"""Muon: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

# A shape here is the rows of a list's matrices, which are square where `columns` is not given.
SMALL = ((0,), (1,), (7, 8), (3, 0, 16), (33,))
LARGE = ((1024,) * 8,)
VARIANTS: tuple[dict, ...] = (
    {},
    {"columns": 24, "masters": True},
    {"columns": 3, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    {"grad_dtype": torch.float32, "grad_scale": 0.125, "maximize": True},
    {"stochastic_rounding": -(2**33) - 5},
)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    columns: int | None = None,
    grad_dtype: torch.dtype | None = None,
    masters: bool = False,
    lr: float = 0.02,
    adjust_lr_fn: str = "original",
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    nesterov: bool = True,
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    grad_scale: float | None = None,
    maximize: bool = False,
    stochastic_rounding: int | None = None,  # of bfloat16 params
) -> tuple:
    """Forward arguments in schema order: lists of matrices with `shape[i]` rows, params of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    grad_dtype = dtype if grad_dtype is None or dtype == torch.float64 else grad_dtype
    n, sizes = len(shape), [(rows, rows if columns is None else columns) for rows in shape]
    tensors = random(seed, device, *((size, each) for each in (wide, grad_dtype, wide) for size in sizes))
    weights, grads, buffers = (tensors[i : i + n] for i in range(0, 3 * n, n))
    return (
        [weight.to(dtype, copy=True) for weight in weights],
        grads,
        buffers,
        weights if masters else [],
        *(lr, adjust_lr_fn, momentum, weight_decay, nesterov, *coefficients, eps, ns_steps),
        None if grad_scale is None else torch.tensor(grad_scale, device=device),
        maximize,
        stochastic_rounding if dtype == torch.bfloat16 else None,
    )


def traffic(direction: str, params: list, grads: list, buffers: list, masters: list, *_: object) -> int:
    """Bytes that must move: buffers and p in and out, grads in; with masters, params out too. The products come on top,
    as large as the caches make them.
    """
    states = 2 * sum(tensor.nbytes for tensor in [*buffers, *(masters or params)])
    return states + sum(tensor.nbytes for tensor in [*grads, *(params if masters else [])])


def flops(direction: str, params: list, *settings: object) -> int:
    """Three products an iteration: x xᵀ, its square, and that times x."""
    ns_steps: int = settings[12]  # type: ignore[assignment]
    sizes = [sorted(param.shape) for param in params]
    return ns_steps * sum(4 * short * short * long + 2 * short**3 for short, long in sizes)
