"""What the cases.py of every op shares."""

from __future__ import annotations

import torch


def random(seed: int, device: str, *tensors: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Standard normal tensors, the same numbers for every dtype and device: drawn in float64, then rounded.

    On the device "meta" they have no numbers.
    """
    if device == "meta":
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in tensors]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape, dtype in tensors]
