"""The matrix products of `lora_linear`: where a GEMM core takes them over, this file changes and no other."""

from __future__ import annotations

import torch


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a · b, of two matrices."""
    return torch.mm(a, b, out=out)


def add_product(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """c += scale · a · b, in place."""
    return c.addmm_(a, b, alpha=scale)
