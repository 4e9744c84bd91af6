"""GEGLU on native kernels."""

from llmsys.ops import _native
from llmsys.ops._activation_native import gelu_name, glu
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """GEGLU on `kernels`."""
    return glu(kernels, gelu_name)


CPU: Impl = implementation(_native.CPU)
