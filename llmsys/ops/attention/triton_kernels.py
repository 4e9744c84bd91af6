"""Attention in Triton."""

from llmsys.ops.attention.triton_backward import backward
from llmsys.ops.attention.triton_forward import forward

__all__ = ["backward", "forward"]
