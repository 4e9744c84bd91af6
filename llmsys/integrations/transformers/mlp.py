"""Gated feed-forward layers: linear layers around an activation times a product, which becomes one op."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llmsys.integrations.transformers import activations, probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.geglu import geglu
from llmsys.ops.reglu import reglu
from llmsys.ops.swiglu import swiglu

# The op that is activation(gate) · up, by the activation.
GATED: dict[str, tuple[Callable, Callable]] = {
    "swiglu": (F.silu, swiglu),
    "geglu": (F.gelu, geglu),
    "geglu, tanh": (partial(F.gelu, approximate="tanh"), partial(geglu, approximate="tanh")),
    "reglu": (F.relu, reglu),
}
_NAMES = " or ".join(dict.fromkeys(name.split(",")[0] for name in GATED))


def gated(op: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate) · up, in the wider dtype of both, as a product has it."""
    if gate.dtype is not up.dtype:
        wide = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(wide), up.to(wide)
    return GATED[op][1](gate, up)


class GatedMLP(Swapped):
    """down(activation(gate(x)) · up(x)), whatever the names of the three."""

    gate_name: str
    up_name: str
    down_name: str
    op: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = getattr(self, self.gate_name)(x), getattr(self, self.up_name)(x)
        return getattr(self, self.down_name)(gated(self.op, gate, up))


class JoinedGatedMLP(Swapped):
    """The same with gate and up in one linear layer, the gate first."""

    gate_up_name: str
    down_name: str
    op: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = getattr(self, self.gate_up_name)(x).chunk(2, dim=-1)
        return getattr(self, self.down_name)(gated(self.op, gate, up))


class Experts(Swapped):
    """Experts whose gating is a method of its own, `_apply_gate`, as transformers has it since version 5."""

    op: str

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated(self.op, *gate_up.chunk(2, dim=-1))


class _Stand(nn.Module):
    """Stands in for a linear layer in a probe: x · a + b for each given (a, b), side by side.

    With the shift no two of three layers could be taken for each other: gate(x) · (c · x) is c · (gate(x) · x).
    """

    def __init__(self, *maps: torch.Tensor):
        super().__init__()
        self.maps = maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * factor + shift for factor, shift in self.maps], -1)


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for `module`, why it is left, or None if it is no gated layer."""
    if callable(getattr(module, "_apply_gate", None)):
        return _propose_experts(module)
    children = {name: child for name, child in module._modules.items() if child is not None}
    linear = [name for name, child in children.items() if _is_linear(child)]
    others = {name: child for name, child in children.items() if name not in linear}
    if len(linear) not in (2, 3) or module._parameters or not _activations(module, others):
        return None
    if any(child._modules or child._parameters for child in others.values()):
        return None
    if any(isinstance(child, nn.Dropout) for child in others.values()):
        return None if len(linear) == 2 else "it has dropout inside"
    weight = next(module.parameters(), torch.empty(0))
    roles = [("gate_name", "up_name", "down_name"), ("gate_up_name", "down_name")][3 - len(linear)]
    mixin = {3: GatedMLP, 2: JoinedGatedMLP}[len(linear)]
    for op, names in itertools.product(GATED, itertools.permutations(linear)):
        dtypes = probe.dtypes(weight.dtype if weight.is_floating_point() else torch.float32)
        if all(_computes(module, others, op, names, dtype) for dtype in dtypes):
            covers = tuple(_activations(module, others))
            return Swap(op, mixin, {"op": op, **dict(zip(roles, names, strict=True))}, covers)
    if len(linear) == 2 and any(activations.propose(child, model) for child in others.values()):
        return None  # a layer without a gate, whose activation is a module of its own
    return f"its forward is no {_NAMES} between linear layers"


def _propose_experts(module: nn.Module) -> Swap | str:
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation in (None, "eager"):
        return (
            "its experts run one by one, where nothing can be put in between; "
            'call model.set_experts_implementation("grouped_mm") first'
        )
    children = {name: child for name, child in module._modules.items() if child is not None}
    if any(child._modules or child._parameters for child in children.values()):
        return "its experts are modules of their own"
    gate, up = _numbers((4, 8), (4, 8), dtype=torch.float32)
    apply_gate: Any = probe.twin(module, {}, _without_hooks(children))._apply_gate
    for op in GATED:
        if all(_agrees(probe.outcome(apply_gate, torch.cat((g, up), -1)), op, g, up) for g in (gate, 10 * gate)):
            return Swap(op, Experts, {"op": op}, tuple(children.values()))
    return f"its gate is no {_NAMES}"


def _computes(module: nn.Module, others: dict, op: str, names: tuple[str, ...], dtype: torch.dtype) -> bool:
    """Whether the module's forward is down(activation(gate(x)) · up(x)), with `names` in these roles."""
    x, *maps = _numbers((2, 3, 8), (2, 8), (2, 8), (2, 8), dtype=dtype)
    gate, up, down = _Stand(maps[0]), _Stand(maps[1]), _Stand(maps[2])
    stands = (gate, up, down) if len(names) == 3 else (_Stand(maps[0], maps[1]), down)
    twin = probe.twin(module, {}, {**_without_hooks(others), **dict(zip(names, stands, strict=True))})
    for scale in (1, 10):  # far out, where a clamp would show
        given = probe.outcome(twin.forward, scale * x)
        if not _agrees(given, op, gate(scale * x), up(scale * x), *maps[2]):
            return False
    return True


def _agrees(given: object, op: str, gate: torch.Tensor, up: torch.Tensor, *down: torch.Tensor) -> bool:
    """Whether `given` is activation(gate) · up, times the first of `down` plus the second."""
    activation, _ = GATED[op]

    def formula(gate: torch.Tensor, up: torch.Tensor, factor: torch.Tensor | int = 1, shift: torch.Tensor | int = 0):
        return activation(gate) * up * factor + shift

    truth = formula(*(tensor.double() for tensor in (gate, up, *down)))
    return probe.agrees(given, truth, formula(gate, up, *down), roundings=4)


def _numbers(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    cpu = torch.device("cpu")
    return [probe.numbers(*shape, seed=seed, dtype=dtype, device=cpu) for seed, shape in enumerate(shapes)]


def _without_hooks(children: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: probe.twin(child, {}, {}) for name, child in children.items()}


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear and what stands for it: adapters and quantised layers; GPT-2's Conv1D, which is one transposed."""
    return hasattr(module, "out_features") or (hasattr(module, "nf") and hasattr(module, "nx"))


def _activations(module: nn.Module, others: dict[str, nn.Module]) -> list:
    """What may be the activation: a submodule that holds nothing, or a function kept as an attribute."""
    empty = [child for child in others.values() if not (child._modules or child._buffers or child._parameters)]
    held = [child for child in empty if not isinstance(child, (nn.Dropout, nn.Identity))]
    return held + [value for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
