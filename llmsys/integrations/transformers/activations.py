"""Activations that stand alone, as in layers without a gate: modules that hold nothing and compute what an op does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.gelu import gelu
from llmsys.ops.relu2 import relu2
from llmsys.ops.silu import silu

# PyTorch's formula and the op, by what the report says.
OPS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (F.gelu, gelu),
    "gelu, tanh": (partial(F.gelu, approximate="tanh"), partial(gelu, approximate="tanh")),
    "silu": (F.silu, silu),
    "relu2": (lambda x: F.relu(x).square(), relu2),
}


class Activation(Swapped):
    op: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPS[self.op][1](x)


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for `module`, or None if it is no activation that an op computes."""
    if module._modules or module._parameters or module._buffers:
        return None
    for op, (formula, _) in OPS.items():
        if all(_computes(module, formula, scale) for scale in (1, 10)):
            return Swap(op, Activation, {"op": op})
    return None


def _computes(module: nn.Module, formula: Callable, scale: float) -> bool:
    """Whether the module's forward is the formula, and leaves its input as it is."""
    x = scale * probe.numbers(3, 50, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    given = x.clone()
    result = probe.outcome(probe.twin(module, {}, {}).forward, given)
    return probe.agrees(result, formula(x.double()), formula(x), roundings=4) and torch.equal(given, x)
