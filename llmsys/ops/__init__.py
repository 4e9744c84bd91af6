"""Fused operations on tensors: each one contract with several implementations."""

from llmsys import env as _env
from llmsys.ops import _op
from llmsys.ops._op import Explanation as Explanation, explain as explain, use as use
from llmsys.ops.adamw import adamw as adamw
from llmsys.ops.add_rms_norm import add_rms_norm as add_rms_norm
from llmsys.ops.clamped_swiglu import clamped_swiglu as clamped_swiglu
from llmsys.ops.geglu import geglu as geglu
from llmsys.ops.gelu import gelu as gelu
from llmsys.ops.grad_norm import grad_norm as grad_norm
from llmsys.ops.mlp import mlp as mlp
from llmsys.ops.reglu import reglu as reglu
from llmsys.ops.relu2 import relu2 as relu2
from llmsys.ops.rms_norm import rms_norm as rms_norm
from llmsys.ops.rope import rope as rope, rope_tables as rope_tables
from llmsys.ops.silu import silu as silu
from llmsys.ops.swiglu import swiglu as swiglu

_op.check_forced(_env.forced_implementations())
