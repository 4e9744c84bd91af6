"""SiLU in plain PyTorch."""

from llmsys.ops._activation_reference import silu, silu_slope, unary

forward, backward = unary(silu, silu_slope)
