"""Fused operations on tensors: each one contract with several implementations."""

from llmsys import env as _env
from llmsys.ops import _op
from llmsys.ops._op import Explanation as Explanation, explain as explain, use as use
from llmsys.ops.adamw import adamw as adamw
from llmsys.ops.adamw_8bit import adamw_8bit as adamw_8bit
from llmsys.ops.add_layer_norm import add_layer_norm as add_layer_norm
from llmsys.ops.add_rms_norm import add_rms_norm as add_rms_norm
from llmsys.ops.append_kv import append_kv as append_kv
from llmsys.ops.attention import attention as attention
from llmsys.ops.attention.merge import merge_attention as merge_attention
from llmsys.ops.attention_decode import attention_decode as attention_decode
from llmsys.ops.clamped_swiglu import clamped_swiglu as clamped_swiglu
from llmsys.ops.cross_entropy import cross_entropy as cross_entropy
from llmsys.ops.cross_entropy.sharded import (
    cross_entropy_parts as cross_entropy_parts,
    merge_cross_entropy as merge_cross_entropy,
)
from llmsys.ops.dropout import dropout as dropout
from llmsys.ops.embedding import embedding as embedding
from llmsys.ops.geglu import geglu as geglu
from llmsys.ops.gelu import gelu as gelu
from llmsys.ops.grad_norm import grad_norm as grad_norm
from llmsys.ops.group_norm import group_norm as group_norm
from llmsys.ops.l2_norm import l2_norm as l2_norm
from llmsys.ops.lamb import lamb as lamb
from llmsys.ops.layer_norm import layer_norm as layer_norm
from llmsys.ops.linear import linear as linear
from llmsys.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from llmsys.ops.lion import lion as lion
from llmsys.ops.lora_linear import (
    lora_linear as lora_linear,
    lora_merge as lora_merge,
    lora_unmerge as lora_unmerge,
)
from llmsys.ops.mlp import mlp as mlp
from llmsys.ops.muon import muon as muon
from llmsys.ops.reglu import reglu as reglu
from llmsys.ops.relu2 import relu2 as relu2
from llmsys.ops.rms_norm import rms_norm as rms_norm
from llmsys.ops.rope import (
    LinearScaling as LinearScaling,
    Llama3Scaling as Llama3Scaling,
    NTKScaling as NTKScaling,
    YarnScaling as YarnScaling,
    rope as rope,
    rope_tables as rope_tables,
)
from llmsys.ops.rope_qk import rope_qk as rope_qk
from llmsys.ops.sgd import sgd as sgd
from llmsys.ops.silu import silu as silu
from llmsys.ops.softmax import softmax as softmax
from llmsys.ops.swiglu import swiglu as swiglu

_op.check_forced(_env.forced_implementations())
