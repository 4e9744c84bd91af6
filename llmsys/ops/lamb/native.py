"""LAMB on native kernels. There is one for the CPU only."""

from llmsys.ops import _native
from llmsys.ops._op import Impl
from llmsys.ops.adamw.native import implementation

CPU: Impl = implementation(_native.CPU, "lamb", row_major=True)
