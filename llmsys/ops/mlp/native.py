"""The gated feed-forward layer on llmsys's own GEMM."""

from __future__ import annotations

from llmsys.ops import _matmul, _native
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl
from llmsys.ops.mlp import fused


def implementation(kernels: Kernels) -> Impl:
    """The layer on the products of `kernels`."""
    return fused.implementation(
        kernels.name,
        _matmul.implementation(kernels),
        why_not=kernels.why_not,
        devices=(kernels.device,),
        why_slower=_matmul.why_slower,
    )


CPU: Impl = implementation(_native.CPU)
