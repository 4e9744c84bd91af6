"""Fused operations on tensors: each one contract with several implementations."""

from llmsys import env
from llmsys.ops import _op
from llmsys.ops._op import Explanation, explain, use
from llmsys.ops.adamw import adamw
from llmsys.ops.add_rms_norm import add_rms_norm
from llmsys.ops.grad_norm import grad_norm
from llmsys.ops.linear import linear
from llmsys.ops.rms_norm import rms_norm
from llmsys.ops.rope import rope, rope_tables
from llmsys.ops.swiglu import swiglu

__all__ = [
    "Explanation",
    "adamw",
    "add_rms_norm",
    "explain",
    "grad_norm",
    "linear",
    "rms_norm",
    "rope",
    "rope_tables",
    "swiglu",
    "use",
]

_op.check_forced(env.forced_implementations())
