"""Embedding in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward(
    weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y: see `llmsys.embedding`."""
    try:
        # Of an empty table, PyTorch says that its indices are out of range even where there are none.
        y = F.embedding(ids, weight).contiguous() if ids.numel() else weight.new_empty((*ids.shape, weight.shape[1]))
    except (IndexError, RuntimeError):
        if (error := out_of_range(ids, len(weight))) is None:
            raise
        raise error from None
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


def out_of_range(ids: torch.Tensor, rows: int) -> IndexError | None:
    """The error for ids of which one is not in [0, rows); None where all are."""
    flat = ids.flatten()
    wrong = ((flat < 0) | (flat >= rows)).nonzero()
    if not len(wrong):
        return None
    position = int(wrong[0])
    return IndexError(
        f"llmsys.embedding: ids has {int(flat[position])} at position {position}, expected numbers in [0, {rows})"
    )
