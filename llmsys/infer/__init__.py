"""Generating text from a trained model."""

from llmsys.infer.generate import generate
from llmsys.infer.sampler import Sampler

__all__ = ["Sampler", "generate"]
