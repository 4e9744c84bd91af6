"""SwiGLU in plain PyTorch."""

from llmsys.ops._activation_reference import glu, silu, silu_slope

forward, backward = glu(silu, silu_slope)
