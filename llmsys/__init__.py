"""Fused kernels and parallel systems for training and running large language models."""

from llmsys import memory, nn, ops, optim
from llmsys.integrations.transformers import accelerate, restore
from llmsys.ops import *

__version__ = "0.1.0"
