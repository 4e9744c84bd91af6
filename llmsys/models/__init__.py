"""Single-device models, their sizes and their sharding plans; weights in and out."""

from llmsys.models.llama import SIZES, Llama, LlamaConfig
from llmsys.models.weights import load_weights, save_weights

__all__ = ["SIZES", "Llama", "LlamaConfig", "load_weights", "save_weights"]
