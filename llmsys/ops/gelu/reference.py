"""GELU in plain PyTorch."""

from llmsys.ops._activation_reference import gelu, gelu_slope, unary

forward, backward = unary(gelu, gelu_slope)
