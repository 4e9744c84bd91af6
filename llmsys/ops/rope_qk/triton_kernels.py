"""Rotary position embedding of queries and keys in Triton: the kernel of `rope`, launched over the heads of both."""

from __future__ import annotations

import torch

from llmsys.ops.rope.triton_kernels import launch

Pair = tuple[torch.Tensor, torch.Tensor]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    out: Pair | None = None,
) -> Pair:
    q_out, k_out = launch((q, k), cos, sin, interleaved, False, out)
    return q_out, k_out


def backward(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    out: Pair | None = None,
) -> Pair:
    dq, dk = launch((dq_out, dk_out), cos, sin, interleaved, True, out)
    return dq, dk
