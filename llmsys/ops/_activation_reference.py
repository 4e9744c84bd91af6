"""Activations in plain PyTorch, and the two ways that ops apply one: y = f(x), and y = f(gate) · up.

`value(x, …)` and `slope(x, …)` are f and its derivative on wide tensors; what an op takes besides tensors comes after.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Formula = Callable[..., Tensor]


def unary(value: Formula, slope: Formula) -> tuple[Callable, Callable]:
    """`forward` and `backward` of y = f(x)."""

    def forward(x: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        y = value(_wide(x), *options).to(x.dtype).contiguous()
        return y if out is None else out.copy_(y)

    def backward(dy: Tensor, x: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        dx = (_wide(dy) * slope(_wide(x), *options)).to(x.dtype).contiguous()
        return dx if out is None else out.copy_(dx)

    return forward, backward


def glu(value: Formula, slope: Formula) -> tuple[Callable, Callable]:
    """`forward` and `backward` of y = f(gate) · up."""

    def forward(gate: Tensor, up: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        y = (value(_wide(gate), *options) * _wide(up)).to(gate.dtype).contiguous()
        return y if out is None else out.copy_(y)

    def backward(
        dy: Tensor, gate: Tensor, up: Tensor, *options: object, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        g, d = _wide(gate), _wide(dy)
        dgate = (d * _wide(up) * slope(g, *options)).to(gate.dtype).contiguous()
        dup = (d * value(g, *options)).to(gate.dtype).contiguous()
        return (dgate, dup) if out is None else (out[0].copy_(dgate), out[1].copy_(dup))

    return forward, backward


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def relu_slope(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0.0, torch.ones_like(x))


def relu2(x: Tensor) -> Tensor:
    return torch.relu(x) ** 2


def relu2_slope(x: Tensor) -> Tensor:
    return 2 * torch.relu(x)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid + x * sigmoid * (1 - sigmoid)


def gelu(x: Tensor, approximate: str) -> Tensor:
    return x * (_cdf(x) if approximate == "none" else _near_cdf(x))


def gelu_slope(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return _cdf(x) + x * (torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))
    x = x.clamp(-30, 30)  # beyond, the sigmoid is 0 or 1, and x² must not become infinite beside a 0
    sigmoid = _near_cdf(x)
    return sigmoid + x * sigmoid * (1 - sigmoid) * (math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x))


def _cdf(x: Tensor) -> Tensor:
    """The normal distribution: (1 + erf(x / √2)) / 2, without the cancellation of that sum far below 0."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _near_cdf(x: Tensor) -> Tensor:
    """(1 + tanh u) / 2 = sigmoid(2 u) with u = √(2/π) (x + 0.044715 x³)."""
    return torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
