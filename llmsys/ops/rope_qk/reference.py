"""Rotary position embedding of queries and keys in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops.rope import reference

Pair = tuple[torch.Tensor, torch.Tensor]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    out: Pair | None = None,
) -> Pair:
    """(q_out, k_out): see `llmsys.rope_qk`."""
    q_out, k_out = (None, None) if out is None else out
    return reference.forward(q, cos, sin, interleaved, q_out), reference.forward(k, cos, sin, interleaved, k_out)


def backward(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    out: Pair | None = None,
) -> Pair:
    """(dq, dk): rotated by the negative angle."""
    return forward(dq_out, dk_out, cos, -sin, interleaved, out)
