"""Fused kernels and parallel systems for training and running large language models."""

__version__ = "0.1.0"
