"""Sequences of one length."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llmsys.integrations.flash_attn.options import Result, options, with_probabilities
from llmsys.ops.attention import attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Softmax attention: `llmsys.attention` says what is computed, and how exactly.

    Of seqlen_q queries and seqlen_k keys the last ones stand beside each other: query i sees the keys from
    i + seqlen_k - seqlen_q - window_size[0] to i + seqlen_k - seqlen_q + window_size[1], -1 for all, and with `causal`
    none after i + seqlen_k - seqlen_q. A query that sees nothing has an output of zeros.

    Shapes     q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim), any strides, nheads a
               multiple of nheads_k, headdim to 256; alibi_slopes (nheads,) or (batch, nheads)
               → out (batch, seqlen_q, nheads, headdim); with return_attn_probs (out, softmax_lse, S_dmask):
               softmax_lse (batch, nheads, seqlen_q) float32; S_dmask, with dropout, the softmax (batch, nheads,
               seqlen_q, seqlen_k) in q's dtype, negated where it was dropped, without gradient and in memory that
               grows with seqlen_q · seqlen_k; empty without dropout
    Gradient   dq, dk, dv; always deterministic
    Errors     ValueError or TypeError, from here or from `llmsys.attention`, if the arguments do not fit as above
    """
    given = options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if not return_attn_probs:
        return cast(Tensor, attention(q, k, v, **given))
    num_keys = k.shape[1]
    out, lse, probabilities = with_probabilities(q, k, v, torch.arange(num_keys, device=q.device), num_keys, **given)
    return out, lse, probabilities.transpose(1, 2) if dropout_p > 0 else probabilities


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with k and v in one tensor, read where they lie.

    Shapes     kv (batch, seqlen_k, 2, nheads_k, headdim)
    """
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"llmsys.integrations.flash_attn.flash_attn_kvpacked_func: kv has shape {tuple(kv.shape)}, expected "
            "(batch, seqlen_k, 2, nheads_k, headdim)"
        )
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor, read where they lie.

    Shapes     qkv (batch, seqlen, 3, nheads, headdim)
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"llmsys.integrations.flash_attn.flash_attn_qkvpacked_func: qkv has shape {tuple(qkv.shape)}, expected "
            "(batch, seqlen, 3, nheads, headdim)"
        )
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
