"""Attention in plain PyTorch: every score at once.

Of 16-bit inputs the probabilities, and the gradients of the scores, are rounded to the inputs' dtype before they are
multiplied with v, q, k and dy, as on the tensor cores and dot products that kernels use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsys.ops._philox import random_words
from llmsys.ops.attention.arguments import Arguments
from llmsys.ops.attention.bounds import row_bounds
from llmsys.ops.dropout.reference import threshold_and_scale


def forward(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(y, lse): see `llmsys.attention`."""
    given = Arguments(*args)
    q, sinks = given.q, given.sinks
    scores, _ = _scores(given)
    counted = scores
    if sinks is not None:
        counted = torch.cat((scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    lse = _logsumexp(counted)
    p = _probabilities(scores, lse) * _kept(scores, given)
    y = torch.matmul(_rounded(p, q), _per_query_head(given.v, q)).transpose(1, 2).to(q.dtype).contiguous()
    return (y, lse) if out is None else (out[0].copy_(y), out[1].copy_(lse))


def backward(
    dy: Tensor, dlse: Tensor | None, y: Tensor, lse: Tensor, *args: Any, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dsinks); of the last two, no elements where there is nothing to say."""
    given, needs_dbias = Arguments(*args[:-1]), args[-1]
    q, k, bias, sinks = given.q, given.k, given.bias, given.sinks
    scores, slope = _scores(given)
    kept = _kept(scores, given)
    p = _probabilities(scores, lse)
    wide_dy = dy.to(p.dtype).transpose(1, 2)
    dv = _per_key_head(torch.matmul(_rounded(p * kept, q).transpose(2, 3), wide_dy), k)
    dp = torch.matmul(wide_dy, _per_query_head(given.v, q).transpose(2, 3)) * kept
    arriving = delta(dy, dlse, y)
    ds = p * (dp - arriving.unsqueeze(-1))
    dz = _rounded(ds if slope is None else ds * slope, q)
    dq = given.scale * torch.matmul(dz, _per_query_head(k, q)).transpose(1, 2)
    dk = given.scale * _per_key_head(torch.matmul(dz.transpose(2, 3), q.to(p.dtype).transpose(1, 2)), k)
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))
    if out is not None:
        dq, dk, dv = (to.copy_(grad) for to, grad in zip(out, (dq, dk, dv), strict=True))
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and needs_dbias else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else sinks_gradient(arriving, lse, sinks)
    return dq, dk, dv, dbias, dsinks


def delta(dy: Tensor, dlse: Tensor | None, y: Tensor) -> Tensor:
    """What is taken from the gradient of each of a row's probabilities, (B, H, T)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    rows = (dy.to(wide) * y.to(wide)).sum(-1).transpose(1, 2)
    return rows if dlse is None else rows - dlse


def sinks_gradient(arriving: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """dsinks, (H,). `arriving` is `delta`: a sink has a probability in each row and no value, so that nothing else
    comes to it."""
    p = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
    return -(p * arriving).sum((0, 2)).to(sinks.dtype)


def _scores(given: Arguments) -> tuple[Tensor, Tensor | None]:
    """(B, H, T, S), -inf where a query does not see a key; and the slope of the softcap there, None for 1."""
    q, k = given.q, given.k
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = given.scale * torch.matmul(q.to(wide).transpose(1, 2), _per_query_head(k, q).transpose(2, 3))
    slope = None
    if given.softcap:
        capped = torch.tanh(scores / given.softcap)
        scores, slope = given.softcap * capped, 1 - capped * capped
    rows = row_bounds(given)
    keys = torch.arange(k.shape[1], device=q.device)
    if given.alibi_slopes is not None:
        slopes = given.alibi_slopes.to(wide)
        of_rows = slopes.unsqueeze(-1) if given.cu_seqlens_q is None else slopes[rows[3].long()].t().unsqueeze(0)
        scores = scores - of_rows.unsqueeze(-1) * (rows[2].unsqueeze(-1) - keys).abs()
    if given.bias is not None:
        scores = scores + given.bias.to(wide)
    seen = (keys >= rows[0].unsqueeze(-1)) & (keys < rows[1].unsqueeze(-1))
    if given.block_mask is not None:
        t = torch.arange(q.shape[1], device=q.device)
        seen = seen & given.block_mask[:, :, (t // given.block_size).unsqueeze(-1), keys // given.block_size]
    return scores.masked_fill(~seen, -torch.inf), slope


def _logsumexp(scores: Tensor) -> Tensor:
    """Of each row; -inf, with gradient 0, of one that sees nothing."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    blind = (scores == -torch.inf).all(-1)
    return torch.logsumexp(scores.masked_fill(blind.unsqueeze(-1), 0), -1).masked_fill(blind, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))


def _kept(scores: Tensor, given: Arguments) -> Tensor | float:
    """1 / (1 - dropout_p) where a probability is kept and 0 where it is dropped."""
    if given.dropout_p == 0:
        return 1.0
    *rows, keys = scores.shape
    pitch = -(-keys // 4) * 4
    threshold, scale = threshold_and_scale(given.dropout_p)
    words = random_words(given.seed, 0, torch.Size(rows).numel() * pitch, scores.device)
    return (words.view(*rows, pitch)[..., :keys] >= threshold).to(scores.dtype) * scale


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """k or v as (B, H, S, D), in the dtype that is computed in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], 1)


def _per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """The sum over the query heads of each key head: (B, H, S, D) to (B, S, K, D)."""
    return x.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2)


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    """To the dtype of `like` and back."""
    return x if like.dtype == x.dtype else x.to(like.dtype).to(x.dtype)
