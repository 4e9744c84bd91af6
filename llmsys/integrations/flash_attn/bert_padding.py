"""Between padded batches and packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of `input` at `indices`.

    Shapes     input (N, ...), indices (M,) integer → (M, ...)
    Gradient   dinput
    """
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask keeps, one after another.

    Shapes     hidden_states (batch, seqlen, ...), attention_mask (batch, seqlen), bool or 0 and 1; unused_mask the
               same, of tokens that are kept too but not counted as used → (packed (total, ...), indices (total,) of
               the tokens in batch · seqlen, cu_seqlens int32 (batch + 1,), the longest sequence, seqused int32
               (batch,): how many tokens attention_mask keeps)
    Gradient   dhidden_states
    Errors     ValueError if the masks are not (batch, seqlen)
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"llmsys.integrations.flash_attn.bert_padding.unpad_input: {name} has shape {tuple(mask.shape)}, "
                f"expected (batch, seqlen) = {tuple(hidden_states.shape[:2])}"
            )
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    used = attention_mask.sum(-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The tokens of a padded batch, from those that `unpad_input` kept; zeros elsewhere.

    Shapes     hidden_states (total, ...), indices (total,) → (batch, seqlen, ...)
    Gradient   dhidden_states
    """
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
