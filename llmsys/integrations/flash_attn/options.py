"""Options that all of the functions have, and what they return."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from llmsys.nn.dropout import drawn_seed
from llmsys.ops.attention import attention

Result = Tensor | tuple[Tensor, Tensor, Tensor]
# The most columns that values have: as many probabilities are read at once.
COLUMNS = 256


def options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The same, as `llmsys.attention` names them."""
    return {
        "causal": causal,
        "scale": softmax_scale,
        "window": window(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "seed": drawn_seed() if dropout_p > 0 else None,
    }


def window(window_size: tuple[int, int]) -> tuple[int, int]:
    """The same pair.

    Errors     ValueError if it is no pair of integers from -1
    """
    if len(window_size) != 2 or not all(isinstance(size, int) and size >= -1 for size in window_size):
        raise ValueError(
            f"llmsys.integrations.flash_attn: window_size is {window_size}, expected (left, right), the numbers of "
            "keys seen before and after a query's own place, -1 for all"
        )
    left, right = window_size
    return left, right


def with_probabilities(q: Tensor, k: Tensor, v: Tensor, places: Tensor, num_places: int, **given: Any) -> Any:
    """(out, softmax_lse, probabilities): of a key s the one in column places[s] of num_places, negated where it was
    dropped. Without dropout no probabilities, as flash-attn has it: an empty tensor.

    They are read off as the outputs for values that are rows of the identity; which were dropped, off those of scores
    that are all alike.
    """
    out, lse = attention(q, k, v, **given, return_lse=True)
    if given["dropout_p"] == 0:
        return out, lse, out.new_empty(0)
    alike = {**given, "softcap": 0.0, "alibi_slopes": None}
    zeros, without = torch.zeros_like(q), {**given, "dropout_p": 0.0}
    pieces = []
    with torch.no_grad():
        for start in range(0, num_places, COLUMNS):
            columns = torch.arange(start, min(start + COLUMNS, num_places), device=q.device)
            identity = (places.unsqueeze(-1) == columns).to(q.dtype).unsqueeze(-2)
            values = identity.expand(*k.shape[:-1], len(columns))
            p = cast(Tensor, attention(q, k, values, **without))
            kept = cast(Tensor, attention(zeros, k, values, **alike)) > 0
            pieces.append(torch.where(kept, p, -p))
    return out, lse, torch.cat(pieces, -1) if pieces else out.new_empty(*q.shape[:-1], 0)
