"""Modules: parameters and initialisation around the functions of `llmsys.ops`."""

from llmsys.nn.activations import GELU, SiLU
from llmsys.nn.dropout import Dropout
from llmsys.nn.embedding import Embedding
from llmsys.nn.group_norm import GroupNorm
from llmsys.nn.layer_norm import LayerNorm
from llmsys.nn.linear import Linear
from llmsys.nn.mlp import MLP
from llmsys.nn.rms_norm import RMSNorm

__all__ = ["GELU", "MLP", "Dropout", "Embedding", "GroupNorm", "LayerNorm", "Linear", "RMSNorm", "SiLU"]
