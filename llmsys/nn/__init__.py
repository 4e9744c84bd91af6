"""Modules: parameters and initialisation around the functions of `llmsys.ops`."""

from llmsys.nn.activations import GELU, SiLU
from llmsys.nn.dropout import Dropout
from llmsys.nn.embedding import Embedding
from llmsys.nn.group_norm import GroupNorm
from llmsys.nn.layer_norm import LayerNorm
from llmsys.nn.linear import FusedLinear, Linear
from llmsys.nn.lora_linear import LoRALinear
from llmsys.nn.losses import CrossEntropyLoss
from llmsys.nn.mlp import MLP
from llmsys.nn.positions import alibi_slopes, sinusoidal_positions
from llmsys.nn.rms_norm import RMSNorm
from llmsys.nn.softmax import Softmax

__all__ = [
    "GELU",
    "MLP",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "FusedLinear",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "LoRALinear",
    "RMSNorm",
    "SiLU",
    "Softmax",
    "alibi_slopes",
    "sinusoidal_positions",
]
