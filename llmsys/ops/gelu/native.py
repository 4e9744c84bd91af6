"""GELU on native kernels."""

from llmsys.ops import _native
from llmsys.ops._activation_native import gelu_name, unary
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """GELU on `kernels`."""
    return unary(kernels, gelu_name)


CPU: Impl = implementation(_native.CPU)
