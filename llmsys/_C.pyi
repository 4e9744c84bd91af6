# The native kernels (csrc/). Functions take addresses, sizes and strides; llmsys/ops/*/native.py are their only callers.
from types import ModuleType

cpu: ModuleType
cuda: ModuleType  # absent from a build without nvcc
