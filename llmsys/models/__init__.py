"""Single-device models, their sizes and their sharding plans; weights in and out."""

from llmsys.models.gpt2 import GPT2, GPT2Config
from llmsys.models.llama import SIZES, Llama, LlamaConfig
from llmsys.models.weights import load_weights, save_weights

__all__ = ["GPT2", "SIZES", "GPT2Config", "Llama", "LlamaConfig", "load_weights", "save_weights"]
