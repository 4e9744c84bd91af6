"""Embedding in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward(
    weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y: see `llmsys.embedding`."""
    try:
        y = F.embedding(ids, weight).contiguous()
    except IndexError:
        raise out_of_range(ids, len(weight)) from None
    return y if out is None else out.copy_(y)


def backward(
    dy: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """dweight, summed in the order of ids."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    dy = dy.to(wide)
    if padding_idx is not None:
        dy = torch.where((ids != padding_idx).unsqueeze(-1), dy, 0.0)
    zeros = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    dweight = zeros.index_add(0, ids.flatten(), dy.reshape(ids.numel(), weight.shape[1])).to(weight.dtype)
    return dweight if out is None else out.copy_(dweight)


def out_of_range(ids: torch.Tensor, rows: int) -> IndexError:
    """The error for ids of which at least one is not in [0, rows)."""
    flat = ids.flatten()
    position = int(((flat < 0) | (flat >= rows)).int().argmax())
    return IndexError(
        f"llmsys.embedding: ids has {int(flat[position])} at position {position}, expected numbers in [0, {rows})"
    )
