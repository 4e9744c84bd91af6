"""Gradient norm: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

# A shape here is the sizes of the list's tensors.
SMALL = (
    (0,),
    (1,),
    (7, 8, 9),
    (15, 16, 17, 31, 32, 33),
    (63, 64, 65, 127, 128, 129),
    (1000, 0, 3),
    (4095, 4096, 4097),
    (100_000,),
)
LARGE = ((1 << 25,), (1 << 22, 1 << 11) * 8)
VARIANTS: tuple[dict, ...] = ({}, {"scale": 1e12}, {"scale": 1e-12})


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, scale: float = 1.0
) -> tuple[list[torch.Tensor]]:
    """Forward arguments in schema order: a list of 1-d tensors with `shape[i]` elements of about `scale`."""
    return ([tensor * scale for tensor in random(seed, device, *(((size,), dtype) for size in shape))],)


def traffic(direction: str, tensors: list[torch.Tensor]) -> int:
    """Bytes that must move: the tensors in."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flops(direction: str, tensors: list[torch.Tensor]) -> int:
    """A product and a sum an element."""
    return 2 * sum(tensor.numel() for tensor in tensors)
