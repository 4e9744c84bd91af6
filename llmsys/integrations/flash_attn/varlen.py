"""Sequences of unequal lengths, packed one after another."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmsys.integrations.flash_attn.options import Result, options, with_probabilities
from llmsys.ops.attention import attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of each of the packed sequences by itself, empty ones among them.

    Shapes     q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim); cu_seqlens_q and cu_seqlens_k int32
               (batch + 1,), where each sequence starts and the last one ends; no sequence is longer than max_seqlen_q
               or max_seqlen_k. With block_table int32 (batch, blocks of a sequence), k and v are (num_blocks,
               page_block_size, nheads_k, headdim), and the pages that are used are copied
               → out (total_q, nheads, headdim); with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse
               (nheads, total_q) float32; S_dmask, with dropout, (batch, nheads, max_seqlen_q, max_seqlen_k), see
               `flash_attn_func`, 0 beyond the end of a sequence
    Gradient   dq, dk, dv; always deterministic
    Errors     ValueError or TypeError, from here or from `llmsys.attention`, if the arguments do not fit as above; the
               values of cu_seqlens are looked at on a CPU alone
    """
    given = options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _check_max_seqlen("q", cu_seqlens_q, max_seqlen_q)
    _check_max_seqlen("k", cu_seqlens_k, max_seqlen_k)
    if block_table is not None:
        tokens = _tokens_of_pages(k, cu_seqlens_k, block_table)
        k, v = k.flatten(0, 1)[tokens], v.flatten(0, 1)[tokens]
    given |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if not return_attn_probs:
        return cast(Tensor, attention(q, k, v, **given))
    _, places = _sequences_and_places(cu_seqlens_k, k.shape[0])
    out, lse, probabilities = with_probabilities(q, k, v, places, max_seqlen_k, **given)
    if dropout_p > 0:
        lengths = cu_seqlens_q.diff().tolist()
        rows = list(probabilities[: sum(lengths)].split(lengths))
        rows[0] = torch.cat((rows[0], probabilities.new_zeros(max_seqlen_q - lengths[0], *probabilities.shape[1:])))
        probabilities = pad_sequence(rows, batch_first=True).transpose(1, 2)
    return out, lse, probabilities


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor, read where they lie.

    Shapes     kv (total_k, 2, nheads_k, headdim)
    """
    if kv.dim() != 4 or kv.shape[1] != 2:
        raise ValueError(
            f"llmsys.integrations.flash_attn.flash_attn_varlen_kvpacked_func: kv has shape {tuple(kv.shape)}, expected "
            "(total_k, 2, nheads_k, headdim)"
        )
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor, read where they lie.

    Shapes     qkv (total, 3, nheads, headdim); cu_seqlens int32 (batch + 1,)
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"llmsys.integrations.flash_attn.flash_attn_varlen_qkvpacked_func: qkv has shape {tuple(qkv.shape)}, "
            "expected (total, 3, nheads, headdim)"
        )
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _check_max_seqlen(name: str, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling() or cu_seqlens.shape[0] < 2:
        return
    longest = int(cu_seqlens.diff().max())
    if longest > max_seqlen:
        raise ValueError(
            f"llmsys.integrations.flash_attn: max_seqlen_{name} is {max_seqlen}, expected at least {longest}, the "
            f"longest sequence of cu_seqlens_{name}"
        )


def _sequences_and_places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each token the sequence it is of, and its place in it; tokens after the last sequence count on."""
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    sequences = (torch.searchsorted(cu_seqlens, tokens, right=True) - 1).clamp(max=cu_seqlens.shape[0] - 2)
    return sequences, tokens - cu_seqlens[sequences]


def _tokens_of_pages(cache: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> Tensor:
    """Where the tokens of the packed sequences are, counted over all pages."""
    if cache.dim() != 4 or block_table.dtype != torch.int32 or block_table.dim() != 2:
        raise ValueError(
            f"llmsys.integrations.flash_attn.flash_attn_varlen_func: block_table is {block_table.dtype} "
            f"{tuple(block_table.shape)} and k has shape {tuple(cache.shape)}, expected torch.int32 (batch, blocks of "
            "a sequence) and (num_blocks, page_block_size, nheads_k, headdim)"
        )
    page_size = cache.shape[1]
    sequences, places = _sequences_and_places(cu_seqlens_k, int(cu_seqlens_k[-1]))
    return block_table[sequences, places // page_size] * page_size + places % page_size
