"""Which keys a query sees: for each query row a run of keys. Causal, windowed and packed attention are all this."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmsys.ops.attention.arguments import Arguments


def row_bounds(given: Arguments) -> Tensor:
    """For each query t, as rows of an int32 table (4, T):

    0, 1  the keys that it sees: from `first` up to, not including, `end`; neither ever falls as t grows
    2     the key that stands at the query's own place, counting both sequences from their ends
    3     which of the packed sequences the query is of
    """
    q, k = given.q, given.k
    far = q.shape[1] + k.shape[1]
    left, right = (size if size < far else -1 for size in (given.window_left, given.window_right))
    window = left, right
    if given.cu_seqlens_q is None or given.cu_seqlens_k is None:
        if torch.compiler.is_compiling() or type(q) is not Tensor:  # what is traced must not stay behind
            return _of_whole.__wrapped__(q.shape[1], k.shape[1], window, q.device)
        return _of_whole(q.shape[1], k.shape[1], window, q.device)
    return _table(q.shape[1], k.shape[1], window, given.cu_seqlens_q, given.cu_seqlens_k)


def column_bounds(rows: Tensor, num_keys: int) -> Tensor:
    """For each key s, as rows of an int32 table (2, S): the first query whose run ends after s, and the first whose run
    starts after s. The queries that see s are among those between.
    """
    first, end = rows[0].contiguous(), rows[1].contiguous()
    keys = torch.arange(num_keys, device=rows.device, dtype=torch.int32)
    return torch.stack([torch.searchsorted(bound, keys, right=True, out_int32=True) for bound in (end, first)])


@lru_cache(maxsize=64)
def _of_whole(num_queries: int, num_keys: int, window: tuple[int, int], device: torch.device) -> Tensor:
    ends = [torch.tensor([0, size], dtype=torch.int32, device=device) for size in (num_queries, num_keys)]
    return _table(num_queries, num_keys, window, *ends)


def _table(num_queries: int, num_keys: int, window: tuple[int, int], cu_q: Tensor, cu_k: Tensor) -> Tensor:
    t = torch.arange(num_queries, device=cu_q.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_q, t, right=True, out_int32=True) - 1
    last = cu_q.shape[0] - 2
    beyond = sequence > last  # rows after the last sequence see nothing
    sequence = sequence.clamp(max=last)
    start, stop = cu_k[sequence], cu_k[sequence + 1]
    place = t - cu_q[sequence + 1] + stop
    left, right = window
    first = start if left < 0 else torch.maximum(start, torch.minimum(place - left, stop))
    end = stop if right < 0 else torch.maximum(start, torch.minimum(place + right + 1, stop))
    first, end = first.masked_fill(beyond, num_keys), end.masked_fill(beyond, num_keys)
    return torch.stack((first, torch.maximum(first, end), place, sequence)).int().contiguous()
