"""Linear head and cross entropy on llmsys's own GEMM, and on PyTorch's where that is faster."""

from __future__ import annotations

from llmsys.ops import _matmul, _native
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl
from llmsys.ops.linear_cross_entropy import chunked


def implementation(kernels: Kernels) -> Impl:
    """The chunk engine on the products of `kernels`."""
    return chunked.implementation(
        kernels.name, _matmul.by_rule(kernels), why_not=kernels.why_not, devices=(kernels.device,)
    )


CPU: Impl = implementation(_native.CPU)
