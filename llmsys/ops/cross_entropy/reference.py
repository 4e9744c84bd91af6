"""Cross entropy in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row: see `llmsys.cross_entropy`."""
    z = capped(logits, softcap)
    lse = torch.logsumexp(z, -1)
    valid, index = _in_range(target, z.shape[-1])
    picked = z.gather(-1, index[..., None]).squeeze(-1)
    loss = (1 - label_smoothing) * (lse - picked.where(valid, torch.nan))
    if z_loss:
        loss = loss + z_loss * lse.square()
    if weight is not None:
        loss = loss * weight.to(z.dtype)[index]
    if label_smoothing:
        others = lse[..., None] - z
        others = others if weight is None else others * weight.to(z.dtype)
        loss = loss + label_smoothing / z.shape[-1] * others.sum(-1)
    counts = target != ignore_index
    loss, lse = loss.where(counts, 0.0), lse.where(counts, 0.0)
    return (loss, lse) if out is None else (out[0].copy_(loss), out[1].copy_(lse))


def backward(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    out: Tensor | None = None,
) -> Tensor:
    """dlogits. `lse` is computed anew, so that this function can itself be differentiated."""
    z = capped(logits, softcap)
    lse = torch.logsumexp(z, -1)
    counts = target != ignore_index
    valid, index = _in_range(target, z.shape[-1])
    valid = valid | ~counts  # NaN in a row that does not count would be hidden, but its product with 0 not
    weights = torch.ones_like(z[..., :1]).expand_as(z) if weight is None else weight.to(z.dtype).expand_as(z)
    at_target = (dloss * weights.gather(-1, index[..., None]).squeeze(-1)).where(valid, torch.nan)
    uniform = dloss * label_smoothing / z.shape[-1]
    along = at_target * (1 - label_smoothing) + uniform * weights.sum(-1)
    if z_loss:
        along = along + at_target * 2 * z_loss * lse
    if dlse is not None:
        along = along + dlse
    dz = along[..., None] * torch.exp(z - lse[..., None])
    if label_smoothing:
        dz = dz - uniform[..., None] * weights
    dz = dz.scatter_add(-1, index[..., None], -(1 - label_smoothing) * at_target[..., None])
    if softcap:
        dz = dz * (1 - (z / softcap).square())
    dlogits = dz.where(counts[..., None], 0.0).to(logits.dtype).contiguous()
    return dlogits if out is None else out.copy_(dlogits)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap · tanh(logits / softcap) in float32 or wider; `softcap` 0 is none."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(z / softcap) if softcap else z


def _in_range(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Whether each target is a class, and an index that is one in any case."""
    return (target >= 0) & (target < classes), target.clamp(0, classes - 1)
