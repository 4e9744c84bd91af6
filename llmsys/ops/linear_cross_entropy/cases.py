"""Linear head and cross entropy: inputs, sizes, cost. A shape is (…, D) of the hidden states, whose rows the op has."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops._cases import random
from llmsys.ops.cross_entropy.cases import IGNORED, classes_of

SMALL = ((0, 8), (1, 1), (3, 7), (2, 3, 15), (5, 16), (4, 17), (2, 2, 33), (3, 129))
VARIANTS: tuple[dict, ...] = (
    {},
    {"bias": False, "rank": 0},
    {"reduced": False},
    {"reduced": False, "rank": 0, "weighted": True},
    {"weighted": True, "label_smoothing": 0.2, "z_loss": 1e-2},
    {"softcap": 5.0, "rank": 0},
)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    bias: bool = True,
    rank: int = 3,
    reduced: bool = True,
    weighted: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple:
    """Forward arguments in schema order: rows, a head of 2·D + 1 classes with logits of deviation 1 or so, targets of
    which every fifth is ignored; all that is given needs its gradient."""
    rows, dim, classes = torch.Size(shape[:-1]).numel(), shape[-1], 2 * shape[-1] + 1
    sizes = ((rows, dim), (classes, dim), (classes,), (rank, dim), (classes, rank))
    x, linear_weight, linear_bias, lora_a, lora_b = random(seed, device, *((size, dtype) for size in sizes))
    weight, scale = random(seed, device, ((classes,), torch.float32), ((rows,), torch.float32))
    target = classes_of(seed, device, (rows,), classes)
    a, b = (lora_a * dim**-0.5, lora_b * 0.3) if rank else (None, None)
    wide = torch.promote_types(dtype, torch.float32)
    return (
        *(x, linear_weight * dim**-0.5, target, linear_bias * 0.3 if bias else None, a, b, 0.5),
        *(weight.abs() if weighted else None, IGNORED, label_smoothing, z_loss, softcap),
        *(scale.abs().to(wide) if reduced else None, True, True, bias, rank > 0, rank > 0),
    )


def traffic(direction: str, x: Tensor, linear_weight: Tensor, *_: object) -> int:
    """Bytes that must move: hidden states and weight in; with the gradients, theirs out."""
    return {"forward": 1, "forward+backward": 2}[direction] * (x.nbytes + linear_weight.nbytes)


def flops(direction: str, x: Tensor, linear_weight: Tensor, *_: object) -> int:
    """Those of the matrix products: one of the logits, two of their gradient."""
    return {"forward": 2, "forward+backward": 6}[direction] * x.numel() * linear_weight.shape[0]
