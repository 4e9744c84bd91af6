"""Fused operations on tensors: each one contract with several implementations."""

from llmsys import env as _env
from llmsys.ops import _op
from llmsys.ops._op import Explanation as Explanation, explain as explain, use as use
from llmsys.ops.adamw import adamw as adamw
from llmsys.ops.adamw_8bit import adamw_8bit as adamw_8bit
from llmsys.ops.add_rms_norm import add_rms_norm as add_rms_norm
from llmsys.ops.grad_norm import grad_norm as grad_norm
from llmsys.ops.lion import lion as lion
from llmsys.ops.rms_norm import rms_norm as rms_norm
from llmsys.ops.rope import rope as rope, rope_tables as rope_tables
from llmsys.ops.sgd import sgd as sgd
from llmsys.ops.swiglu import swiglu as swiglu

_op.check_forced(_env.forced_implementations())
