# The native kernels (csrc/). Functions take addresses, sizes and strides; only llmsys/ops/*/native.py call them.
from types import ModuleType

cpu: ModuleType
cuda: ModuleType  # absent from a build without nvcc
