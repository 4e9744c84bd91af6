"""Norms: a weight, an epsilon, and a forward that computes what `rms_norm` computes."""

from __future__ import annotations

import torch
from torch import nn

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.rms_norm import reference, rms_norm

# dtype of the result for (bfloat16 input, float32 weight) and the other way round → whose dtype a result has
RESULT_DTYPES = {
    (torch.float32, torch.float32): "wider",
    (torch.bfloat16, torch.float32): "input",
    (torch.float32, torch.bfloat16): "weight",
}


class RMSNorm(Swapped):
    """RMSNorm under the attribute names of the module it is put over."""

    eps_name: str
    weight: torch.Tensor
    weight_offset: float
    result: str  # whose dtype the result has, where input and weight differ

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, eps, offset = self.weight, getattr(self, self.eps_name), self.weight_offset
        if x.dtype is weight.dtype or (self.result == "input" and weight.dtype is torch.float32):
            return rms_norm(x, weight, eps, weight_offset=offset)
        wide = torch.promote_types(x.dtype, weight.dtype)
        y = rms_norm(x.to(wide), weight.to(wide), eps, weight_offset=offset)
        return y.to({"wider": wide, "input": x.dtype, "weight": weight.dtype}[self.result])


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
    if bias is not None:
        return "there is no op yet for a norm with a bias"
    if not isinstance(eps, (int, float)):
        return f"its {eps_name} is {eps!r}, expected a number"
    if reason := probe.why_not([weight]):
        return reason
    for offset in (0.0, 1.0):
        if all(_computes(module, weight, eps, offset, dtype) for dtype in probe.dtypes(weight.dtype)):
            result = RESULT_DTYPES.get(_result_dtypes(module, weight))
            if result is None:
                return "it takes no input of another dtype than its weight's"
            return Swap("rms_norm", RMSNorm, {"eps_name": eps_name, "weight_offset": offset, "result": result})
    return "its forward is no RMS norm over the last dimension"


def _computes(module: nn.Module, weight: torch.Tensor, eps: float, offset: float, dtype: torch.dtype) -> bool:
    """Whether the module's forward is RMSNorm: on rows of any size, and on rows so small that epsilon decides."""
    dim, device = weight.numel(), weight.device
    w = probe.numbers(dim, seed=0, dtype=dtype, device=device)
    twin = probe.twin(module, {"weight": w}, {})
    for scale in (3.0, max(eps, 1e-12) ** 0.5):
        x = scale * probe.numbers(3, 2, dim, seed=1, dtype=dtype, device=device)
        truth, _ = reference.forward(x.double(), w.double(), eps, offset)
        rounded, _ = reference.forward(x, w, eps, offset)
        given = probe.outcome(twin.forward, x)
        # Llama rounds the normalised row, then its product with the weight.
        if not probe.agrees(given, truth, rounded, roundings=2):
            return False
    return True


def _result_dtypes(module: nn.Module, weight: torch.Tensor) -> tuple:
    """The dtypes of the results for (bfloat16 input, float32 weight) and (float32 input, bfloat16 weight)."""
    found = []
    for x_dtype, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x = torch.ones(1, weight.numel(), dtype=x_dtype, device=weight.device)
        twin = probe.twin(module, {"weight": torch.ones_like(weight, dtype=dtype)}, {})
        found.append(getattr(probe.outcome(twin.forward, x), "dtype", None))
    return tuple(found)
