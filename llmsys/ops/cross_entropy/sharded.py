"""Cross entropy of logits that several ranks hold by classes: each gives parts, and the parts of all give the loss.

Source     Shoeybi et al. 2019, arXiv:1909.08053, section 3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsys.ops import _check
from llmsys.ops.cross_entropy import check_options
from llmsys.ops.cross_entropy.reference import capped


class Parts(NamedTuple):
    """What one shard of the classes knows of each row, in float32 (float64 for float64), each (...).

    max      the largest logit, without a gradient
    sum      Σ_c exp(z[c] - max)
    target   the target's logit; 0 where the target is in another shard, or is ignored
    """

    max: Tensor
    sum: Tensor
    target: Tensor


def cross_entropy_parts(
    logits: Tensor, target: Tensor, first_class: int, *, ignore_index: int = -100, softcap: float = 0.0
) -> Parts:
    """What `merge_cross_entropy` needs to know of the classes [first_class, first_class + V), which `logits` are.

    Shapes     logits (..., V), V > 0; target (...) int64: classes of the whole vocabulary, or ignore_index
    Gradient   dlogits, through sum and target; saves the logits in float32, and makes nothing else of their size
    """
    if logits.dim() == 0 or logits.shape[-1] == 0 or target.shape != logits.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"llmsys.cross_entropy_parts: logits has shape {tuple(logits.shape)} and target {tuple(target.shape)} "
            f"{target.dtype}, expected logits (..., V) and target (...) torch.int64 with V > 0"
        )
    _check.same("cross_entropy_parts", logits=logits)
    if target.device != logits.device:
        raise ValueError(f"llmsys.cross_entropy_parts: target is on {target.device}, expected {logits.device}")
    if not 0 <= first_class < 2**63:
        raise ValueError(f"llmsys.cross_entropy_parts: first_class is {first_class}, expected a class from 0")
    check_options("cross_entropy_parts", ignore_index, "none", 0.0, 0.0, softcap)
    z = capped(logits, softcap)
    index = target - first_class
    here = (index >= 0) & (index < z.shape[-1]) & (target != ignore_index)
    return Parts(*_Parts.apply(z, index.where(here, 0)[..., None], here))


class _Parts(torch.autograd.Function):
    """By autograd's own rules, exp, gather and their gradients would each be of the logits' size, all at once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        highest = z.amax(-1)
        total = (z - highest[..., None]).exp_().sum(-1)
        ctx.save_for_backward(z, highest, index, here)
        ctx.mark_non_differentiable(highest)
        return highest, total, z.gather(-1, index).squeeze(-1).where(here, 0.0)

    @staticmethod
    def backward(ctx: Any, _: Any, dtotal: Tensor, dtarget: Tensor) -> tuple[Tensor, None, None]:
        z, highest, index, here = ctx.saved_tensors
        dz = z - highest[..., None]
        if torch.is_grad_enabled():  # a second derivative reads what was exp's result
            dz = torch.exp(dz) * dtotal[..., None]
        else:
            dz.exp_().mul_(dtotal[..., None])
        return dz.scatter_add_(-1, index, dtarget.where(here, 0.0)[..., None]), None, None


def merge_cross_entropy(
    shards: Sequence[Parts], target: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row from the parts of all shards, as `cross_entropy` with reduction "none" gives them.

    A rank that has its own parts only merges by three reductions: max by maximum, then sum · exp(max - largest max) and
    target by addition.
    """
    if not shards:
        raise ValueError("llmsys.merge_cross_entropy: no shards given, expected the parts of at least one")
    highest = torch.stack([part.max for part in shards]).amax(0)
    total = sum(part.sum * torch.exp(part.max - highest) for part in shards)
    lse = highest + torch.log(total)  # type: ignore[arg-type]
    loss = lse - sum(part.target for part in shards)
    if z_loss:
        loss = loss + z_loss * lse.square()
    counts = target != ignore_index
    return loss.where(counts, 0.0), lse.where(counts, 0.0)
