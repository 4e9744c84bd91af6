"""Modules: parameters and initialisation around the functions of `llmsys.ops`."""

from llmsys.nn.activations import GELU, SiLU
from llmsys.nn.mlp import MLP
from llmsys.nn.rms_norm import RMSNorm

__all__ = ["GELU", "MLP", "RMSNorm", "SiLU"]
