"""Norms: a weight, an epsilon, and a forward that computes what `rms_norm` or `layer_norm` computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.layer_norm import layer_norm, reference as layer_norm_reference
from llmsys.ops.rms_norm import reference as rms_norm_reference, rms_norm

# Whose dtype a result has → its dtype for (bfloat16 input, float32 weight) and for the other way round.
RESULT_DTYPES = {
    "input": (torch.bfloat16, torch.float32),
    "wider": (torch.float32, torch.float32),
    "weight": (torch.float32, torch.bfloat16),
}


class Norm(Swapped):
    """A norm under the attribute names of the module it is put over."""

    weight: torch.Tensor
    eps_name: str
    result: str  # whose dtype the result has, where input and weight differ

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, eps = self.weight, self._parameters.get("bias"), getattr(self, self.eps_name)
        if x.dtype is weight.dtype or (self.result == "input" and weight.dtype is torch.float32):
            return self.norm(x, weight, bias, eps)
        wide = torch.promote_types(x.dtype, weight.dtype)
        y = self.norm(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), eps)
        return y.to({"wider": wide, "input": x.dtype, "weight": weight.dtype}[self.result])

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        raise NotImplementedError


class RMSNorm(Norm):
    weight_offset: float

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps, weight_offset=self.weight_offset)


class LayerNorm(Norm):
    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return layer_norm(x, weight, bias, eps)


@dataclass(frozen=True)
class Formula:
    """What a norm may compute: the op, and the op's reference in the arguments (x, weight, bias, eps)."""

    op: str
    mixin: type[Norm]
    reference: Callable[..., tuple]
    takes_bias: bool
    attributes: dict[str, Any] = field(default_factory=dict)


def _rms_norm(offset: float) -> Formula:
    def reference(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float) -> tuple:
        return rms_norm_reference.forward(x, weight, eps, offset)

    return Formula("rms_norm", RMSNorm, reference, False, {"weight_offset": offset})


FORMULAS = (
    _rms_norm(0.0),
    _rms_norm(1.0),  # Gemma stores the distance from one
    Formula("layer_norm", LayerNorm, layer_norm_reference.forward, True),
)


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for `module`, why it is left, or None if it is no norm."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    eps_names = [name for name in vars(module) if "eps" in name]
    if len(eps_names) != 1 or module._modules or set(module._parameters) - {"weight", "bias"}:
        return None
    (eps_name,) = eps_names
    eps = getattr(module, eps_name)
    if weight is None or weight.dim() != 1 or weight.numel() == 0:
        return "it has no weight of one dimension"
    if not isinstance(eps, (int, float)):
        return f"its {eps_name} is {eps!r}, expected a number"
    if reason := probe.why_not([weight]):
        return reason
    for formula in FORMULAS:
        if bias is not None and not formula.takes_bias:
            continue
        if all(_computes(module, formula, eps, dtype) for dtype in probe.dtypes(weight.dtype)):
            result = _result(module)
            if result is None:
                return "its results have neither the dtype of its input, nor of its weight, nor the wider of both"
            return Swap(formula.op, formula.mixin, {"eps_name": eps_name, "result": result, **formula.attributes})
    return f"its forward is no {' or '.join(dict.fromkeys(f.op for f in FORMULAS))} over the last dimension"


def _twin(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor | None]:
    """The module on a random weight and bias, which come with it."""
    weight = module._parameters["weight"]
    assert weight is not None
    drawn = {
        name: probe.numbers(weight.numel(), seed=seed, dtype=dtype, device=weight.device)
        for seed, name in enumerate(("weight", "bias"))
        if module._parameters.get(name) is not None
    }
    return probe.twin(module, drawn, {}), drawn["weight"], drawn.get("bias")


def _computes(module: nn.Module, formula: Formula, eps: float, dtype: torch.dtype) -> bool:
    """Whether the module's forward is the formula: on rows of any size, and on rows so small that epsilon decides."""
    twin, w, b = _twin(module, dtype)
    for scale in (3.0, max(eps, 1e-12) ** 0.5):
        x = scale * probe.numbers(3, 2, w.numel(), seed=2, dtype=dtype, device=w.device)
        truth, *_ = formula.reference(x.double(), w.double(), None if b is None else b.double(), eps)
        rounded, *_ = formula.reference(x, w, b, eps)
        # Llama rounds the normalised row, then its product with the weight; a bias is a third step.
        if not probe.agrees(probe.outcome(twin.forward, x), truth, rounded, roundings=3):
            return False
    return True


def _result(module: nn.Module) -> str | None:
    """Whose dtype the module's result has. What it cannot compute, ours may."""
    found = []
    for x_dtype, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        twin, w, _ = _twin(module, dtype)
        result = probe.outcome(twin.forward, torch.ones(1, w.numel(), dtype=x_dtype, device=w.device))
        found.append(getattr(result, "dtype", None))
    for result, dtypes in RESULT_DTYPES.items():
        if all(given in (None, dtype) for given, dtype in zip(found, dtypes, strict=True)):
            return result
    return None
