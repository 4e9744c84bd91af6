"""The gated feed-forward layer: inputs, sizes, cost. A shape is x's; inside, the layer is twice as wide."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops._cases import random

SMALL = ((0, 8), (1, 1), (3, 7), (2, 3, 15), (5, 16), (4, 17), (33, 32), (2, 2, 33), (3, 129))
LARGE = ((2048, 1024),)
VARIANTS: tuple[dict, ...] = ({}, {"activation": "gelu"}, {"activation": "gelu_tanh"}, {"activation": "relu"})


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """Forward arguments in schema order: x, weights that keep its scale, and `activation`."""
    dim, hidden = shape[-1], 2 * shape[-1] + shape[-1] % 2  # odd where dim is
    x, gate, up, down = random(
        *(seed, device, (shape, dtype), ((hidden, dim), dtype), ((hidden, dim), dtype), ((dim, hidden), dtype)),
    )
    return x, gate * dim**-0.5, up * dim**-0.5, down * hidden**-0.5, activation


def traffic(direction: str, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> int:
    """Bytes that must move: x and the weights in, y, gate and up out; backward, those and dy in, the gradients out."""
    rows, hidden = x.numel() // x.shape[-1], gate.shape[0]
    weights = gate.numel() + up.numel() + down.numel()
    wide, narrow = 2 * rows * hidden, rows * (x.shape[-1] + down.shape[0])
    return ({"forward": 1, "backward": 2}[direction] * weights + wide + narrow) * x.element_size()


def flops(direction: str, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> int:
    """Those of the matrix products: three forward, six backward."""
    rows, hidden = x.numel() // x.shape[-1], gate.shape[0]
    return {"forward": 2, "backward": 4}[direction] * rows * hidden * (2 * x.shape[-1] + down.shape[0])
