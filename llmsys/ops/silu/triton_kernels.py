"""SiLU in Triton."""

from llmsys.ops._activation_triton import unary

forward, backward = unary(lambda: "silu")
