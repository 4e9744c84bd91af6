"""SiLU on native kernels."""

from llmsys.ops import _native
from llmsys.ops._activation_native import unary
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """SiLU on `kernels`."""
    return unary(kernels, lambda: "silu")


CPU: Impl = implementation(_native.CPU)
