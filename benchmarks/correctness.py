"""The gate before the clock: an implementation whose results are wrong gets no time.

A result may differ from the float64 truth by a multiple of what the reference itself errs in the same dtype, plus one
rounding to that dtype. No tolerance is picked by hand.
"""

from collections.abc import Sequence
from typing import Any

import torch

FACTOR = {"forward": 2.0, "backward": 3.0, "forward+backward": 3.0}


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors inside nested tuples and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (tuple, list)) else []


def convert(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of nested tensors, those of floating point in `dtype` where one is given."""
    if isinstance(value, torch.Tensor):
        copied = value.detach().to(dtype if dtype and value.is_floating_point() else value.dtype, copy=True)
        return copied.requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(convert(item, dtype) for item in value)
    return value


def fault(got: Any, reference: Any, truth: Any, direction: str) -> str | None:
    """None when every tensor of `got` is right, else the first fault in a few words.

    `reference` is what the reference computes in the dtype of `got`, `truth` what it computes in float64.
    """
    triples: Sequence = list(zip(tensors(got), tensors(reference), tensors(truth), strict=True))
    for index, (found, expected, exact) in enumerate(triples):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"result {index}: {tuple(found.shape)} {found.dtype}, not {tuple(expected.shape)} {expected.dtype}"
        if not found.numel():
            continue
        exact = exact.detach()
        known = expected.isfinite() & exact.isfinite()
        if not torch.equal(found.isfinite(), expected.isfinite()):
            return f"result {index}: NaN or infinity where the reference has none, or the other way round"
        own = torch.where(known, (expected.detach().double() - exact).abs(), 0.0).max()
        error = torch.where(known, (found.detach().double() - exact).abs(), 0.0)
        rounding = torch.where(known, exact.abs(), 0.0) * (torch.finfo(found.dtype).eps / 2)
        excess = error - (FACTOR[direction] * own + rounding)
        worst = int(excess.argmax())
        if excess.flatten()[worst] > 0:
            allowed = FACTOR[direction] * own + rounding.flatten()[worst]
            return f"result {index}: error {error.flatten()[worst]:.3g}, allowed {allowed:.3g}"
    return None
