"""ReGLU on native kernels."""

from llmsys.ops import _native
from llmsys.ops._activation_native import glu
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """ReGLU on `kernels`."""
    return glu(kernels, lambda: "relu")


CPU: Impl = implementation(_native.CPU)
