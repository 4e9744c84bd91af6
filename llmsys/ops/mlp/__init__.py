"""The gated feed-forward layer: the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops import _check
from llmsys.ops._matmul import torch_matmul
from llmsys.ops._op import Impl, Op
from llmsys.ops.mlp import fused, native, reference

OP = Op(
    "mlp",
    forward='(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, str activation="silu")'
    " -> (Tensor y, Tensor gate, Tensor up)",
    backward="(Tensor dy, Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, Tensor gate, Tensor up,"
    " str activation, bool needs_dx, bool needs_dgate_weight, bool needs_dup_weight, bool needs_ddown_weight)"
    " -> (Tensor dx, Tensor dgate_weight, Tensor dup_weight, Tensor ddown_weight)",
    implementations=[
        native.CPU,
        fused.implementation("torch", torch_matmul),
        Impl("reference", reference.forward, reference.backward),
    ],
    deferrable=("gate_weight", "up_weight", "down_weight"),
)


def mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, activation: str = "silu") -> Tensor:
    """The feed-forward layer of Llama-style models, which keeps for its backward two of its four wide intermediates.

        y = h · down_weightᵀ,  h = f(gate) · up,  gate = x · gate_weightᵀ,  up = x · up_weightᵀ

    `activation` f is "silu", "gelu", "gelu_tanh" or "relu".

    Shapes     x (..., D), gate_weight and up_weight (H, D), down_weight (D₂, H), of one
               float16/bfloat16/float32/float64, any strides → y (..., D₂), contiguous
    Numerics   products as `linear`'s; gate, up and h rounded to x.dtype, f computed in float32; the two parts of dx
               rounded before they are added, and after
    Gradient   dx, dgate_weight, dup_weight, ddown_weight, each only where needed; saves x, the weights, gate and up,
               which is 2·H·itemsize bytes a row beside x; PyTorch's formula saves f(gate) and h too, 4·H·itemsize. h is
               computed again
    Cost       2·M·H·(2·D + D₂) flop, twice that backward (M rows); h once more in the backward: 3·M·H·itemsize bytes
    Autocast   x and the weights in its dtype, as for torch.nn.functional.linear
    Errors     ValueError if shapes do not fit as above, devices differ or the activation is another; TypeError for
               other or mixed dtypes
    Source     Shazeer 2020, arXiv:2002.05202, eq. 6
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_weight, up_weight, down_weight = (t.to(dtype) for t in (x, gate_weight, up_weight, down_weight))
    _check_arguments(x, gate_weight, up_weight, down_weight, activation)
    return OP(x, gate_weight, up_weight, down_weight, activation)


def _check_arguments(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> None:
    if x.dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.mlp: x is {x.dtype}, expected float32, bfloat16, float16 or float64")
    for name, weight in (("gate_weight", gate), ("up_weight", up), ("down_weight", down)):
        if weight.dtype is not x.dtype:
            raise TypeError(f"llmsys.mlp: {name} is {weight.dtype}, expected {x.dtype} (x's)")
        if weight.device != x.device:
            raise ValueError(f"llmsys.mlp: {name} is on {weight.device}, expected {x.device} (x's)")
    fits = x.dim() > 0 and gate.dim() == down.dim() == 2 and gate.shape == up.shape
    if not (fits and gate.shape[1] == x.shape[-1] and gate.shape[0] == down.shape[1]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, gate, up, down))
        raise ValueError(
            f"llmsys.mlp: x, gate_weight, up_weight, down_weight have shapes {shapes}, "
            "expected (..., D), (H, D), (H, D), (D2, H)"
        )
    if activation not in fused.GLUS:
        raise ValueError(f"llmsys.mlp: activation is {activation!r}, expected one of {list(fused.GLUS)}")
