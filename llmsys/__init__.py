"""Fused kernels and parallel systems for training and running large language models."""

from llmsys import memory, nn, ops, optim
from llmsys.ops import (
    Explanation,
    adamw,
    add_rms_norm,
    explain,
    grad_norm,
    linear,
    rms_norm,
    rope,
    rope_tables,
    swiglu,
    use,
)

__all__ = [
    "Explanation",
    "adamw",
    "add_rms_norm",
    "explain",
    "grad_norm",
    "linear",
    "memory",
    "nn",
    "ops",
    "optim",
    "rms_norm",
    "rope",
    "rope_tables",
    "swiglu",
    "use",
]
__version__ = "0.1.0"
