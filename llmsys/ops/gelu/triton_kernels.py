"""GELU in Triton."""

from llmsys.ops._activation_native import gelu_name
from llmsys.ops._activation_triton import unary

forward, backward = unary(gelu_name)
