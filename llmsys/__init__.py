"""Fused kernels and parallel systems for training and running large language models."""

from llmsys.ops import Explanation, add_rms_norm, explain, rms_norm, rope, rope_tables, swiglu, use

__all__ = ["Explanation", "add_rms_norm", "explain", "rms_norm", "rope", "rope_tables", "swiglu", "use"]
__version__ = "0.1.0"
