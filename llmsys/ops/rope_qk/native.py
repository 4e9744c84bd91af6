"""Rotary position embedding of queries and keys on the native kernels of `rope`."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl
from llmsys.ops.rope.native import rotate

Pair = tuple[torch.Tensor, torch.Tensor]


def implementation(kernels: Kernels) -> Impl:
    """Rotary position embedding of queries and keys on `kernels`."""
    launch = kernels.launch("rope")

    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        out: Pair | None = None,
    ) -> Pair:
        q_out, k_out = rotate(launch, (q, k), cos, sin, interleaved, False, out)
        return q_out, k_out

    def backward(
        dq_out: torch.Tensor,
        dk_out: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        out: Pair | None = None,
    ) -> Pair:
        dq, dk = rotate(launch, (dq_out, dk_out), cos, sin, interleaved, True, out)
        return dq, dk

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
