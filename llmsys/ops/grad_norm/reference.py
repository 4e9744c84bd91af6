"""Gradient norm in plain PyTorch."""

from __future__ import annotations

import torch


@torch.no_grad()
def forward(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The norm of the tensors' norms: see `llmsys.ops.grad_norm`."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch.stack([torch.linalg.vector_norm(tensor.to(wide)) for tensor in tensors])
    return torch.linalg.vector_norm(norms.double()).to(wide)
