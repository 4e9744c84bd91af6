"""GEGLU in plain PyTorch."""

from llmsys.ops._activation_reference import gelu, gelu_slope, glu

forward, backward = glu(gelu, gelu_slope)
