"""Gated feed-forward layers: linear layers around an activation times a product, which becomes one op."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.swiglu import swiglu

# The op that is activation(gate) · up, by the activation.
GATED: dict[str, tuple[Callable, Callable]] = {"swiglu": (F.silu, swiglu)}


def gated(op: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate) · up, in the wider dtype of both, as a product has it."""
    if gate.dtype is not up.dtype:
        wide = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(wide), up.to(wide)
    return GATED[op][1](gate, up)


class GatedMLP(Swapped, nn.Module):
    """down(activation(gate(x)) · up(x)), whatever the names of the three."""

    gate_name: str
    up_name: str
    down_name: str
    op: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self._modules[name] for name in (self.gate_name, self.up_name, self.down_name))
        return down(gated(self.op, gate(x), up(x)))


class JoinedGatedMLP(Swapped, nn.Module):
    """The same with gate and up in one linear layer, the gate first."""

    gate_up_name: str
    down_name: str
    op: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._modules[self.gate_up_name](x).chunk(2, dim=-1)
        return self._modules[self.down_name](gated(self.op, gate, up))


class Experts(Swapped, nn.Module):
    """Experts whose gating is a method of its own, `_apply_gate`, as transformers has it since version 5."""

    op: str

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated(self.op, *gate_up.chunk(2, dim=-1))


class _Scale(nn.Module):
    """Stands in for a linear layer in a probe: x · a for each given a, side by side."""

    def __init__(self, *factors: torch.Tensor):
        super().__init__()
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * factor for factor in self.factors], -1)


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for `module`, why it is left, or None if it is no gated layer."""
    if callable(getattr(module, "_apply_gate", None)):
        return _propose_experts(module)
    linear = [name for name, child in module._modules.items() if child is not None and _is_linear(child)]
    others = {name: child for name, child in module._modules.items() if child is not None and name not in linear}
    if len(linear) not in (2, 3) or module._parameters or not _activations(module, others):
        return None
    if any(next(child.parameters(), None) is not None for child in others.values()):
        return None
    if any(isinstance(child, nn.Dropout) for child in others.values()):
        return "there is no op yet for a layer without a gate" if len(linear) == 2 else "it has dropout inside"
    weight = next(module.parameters())
    roles = [("gate_name", "up_name", "down_name"), ("gate_up_name", "down_name")][3 - len(linear)]
    mixin = {3: GatedMLP, 2: JoinedGatedMLP}[len(linear)]
    for op, names in itertools.product(GATED, itertools.permutations(linear)):
        dtypes = probe.dtypes(weight.dtype if weight.is_floating_point() else torch.float32)
        if all(_computes(module, others, op, names, dtype) for dtype in dtypes):
            covers = tuple(_activations(module, others))
            return Swap(op, mixin, {"op": op, **dict(zip(roles, names, strict=True))}, covers)
    return f"its forward is no {' or '.join(GATED)} between linear layers"


def _propose_experts(module: nn.Module) -> Swap | str:
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation in (None, "eager"):
        return (
            "its experts run one by one, where nothing can be put in between; "
            'call model.set_experts_implementation("grouped_mm") first'
        )
    others = {name: child for name, child in module._modules.items() if child is not None}
    if any(next(child.parameters(), None) is not None for child in others.values()):
        return "its experts are modules of their own"
    gate, up = (probe.numbers(4, 8, seed=seed, dtype=torch.float32, device=torch.device("cpu")) for seed in (0, 1))
    twin = probe.twin(module, {}, others)
    given = probe.outcome(lambda: twin._apply_gate(torch.cat((10 * gate, up), -1)))
    for op in GATED:
        if _agrees(given, op, 10 * gate, up):
            return Swap(op, Experts, {"op": op}, tuple(others.values()))
    return f"its gate is no {' or '.join(GATED)}"


def _computes(module: nn.Module, others: dict, op: str, names: tuple[str, ...], dtype: torch.dtype) -> bool:
    """Whether the module's forward is down(activation(gate(x)) · up(x)), with `names` in these roles."""
    cpu = torch.device("cpu")
    x, a, b, c = (
        probe.numbers(*shape, seed=i, dtype=dtype, device=cpu) for i, shape in enumerate([(2, 3, 8)] + 3 * [(8,)])
    )
    stands = (_Scale(a), _Scale(b), _Scale(c)) if len(names) == 3 else (_Scale(a, b), _Scale(c))
    twin = probe.twin(module, {}, {**others, **dict(zip(names, stands, strict=True))})
    for scale in (1, 10):  # far out, where a clamp would show
        given = probe.outcome(lambda scale=scale: twin.forward(scale * x))
        if not _agrees(given, op, scale * x * a, scale * x * b, c):
            return False
    return True


def _agrees(given: object, op: str, gate: torch.Tensor, up: torch.Tensor, factor: torch.Tensor | float = 1.0) -> bool:
    activation, _ = GATED[op]
    wide = factor.double() if isinstance(factor, torch.Tensor) else factor
    truth = activation(gate.double()) * up.double() * wide
    return probe.agrees(given, truth, activation(gate) * up * factor, roundings=3)


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear and what stands for it: adapters and quantised layers; GPT-2's Conv1D, which is one transposed."""
    return hasattr(module, "out_features") or (hasattr(module, "nf") and hasattr(module, "nx"))


def _activations(module: nn.Module, others: dict[str, nn.Module]) -> list:
    """What may be the activation: a submodule that holds nothing, or a function kept as an attribute."""
    held = [child for child in others.values() if not child._modules and not child._buffers]
    held = [child for child in held if not child._parameters and not isinstance(child, (nn.Dropout, nn.Identity))]
    return held + [value for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
