"""Muon, a drop-in for `torch.optim.Muon`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmsys.ops.muon import muon
from llmsys.ops.muon.reference import ADJUSTMENTS
from llmsys.optim._list_optimizer import ListOptimizer, zeros_like


class Muon(ListOptimizer):
    """Momentum made nearly orthogonal, for the matrices of hidden layers; `llmsys.ops.muon` has the formula.

    Takes what `torch.optim.Muon` takes, and state dicts go both ways. Embeddings, heads, gains and biases belong to
    another optimizer, such as AdamW. Different from it:

    States     momentum_buffer is float32 (float64 for float64 parameters) whatever the parameter's dtype
    Masters    and
    Rounding   as in `llmsys.optim.AdamW`
    Steps      step(grad_scale=…) scales the gradients on the way (see `clip_grad_norm`)
    Errors     ValueError for a value out of range, a parameter that is no matrix or a sparse gradient; TypeError for
               parameters that are not floating point
    Source     Jordan et al. 2024, kellerjordan.github.io/posts/muon
    """

    states = ("momentum_buffer",)
    required = frozenset(states)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        master_weights: bool = True,
        stochastic_rounding: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "maximize": maximize,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _start(self, group: dict[str, Any], state: dict[str, Any], param: torch.Tensor) -> tuple:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = zeros_like(param)
        return ()

    def _update(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, Any]],
        *_: Any,
        **settings: Any,
    ) -> None:
        settings |= {name: group[name] for name in ("momentum", "nesterov", "ns_coefficients", "eps", "ns_steps")}
        settings["adjust_lr_fn"] = group["adjust_lr_fn"] or "original"
        muon(params, grads, [state["momentum_buffer"] for state in states], **settings)

    def _check_settings(self, group: dict[str, Any]) -> None:
        self._check_at_least_zero(group, "momentum", "eps")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"{self._name}: ns_coefficients are {group['ns_coefficients']}, expected three numbers")
        if not 0 <= group["ns_steps"] < 100:
            raise ValueError(f"{self._name}: ns_steps is {group['ns_steps']}, expected a count below 100")
        if group["adjust_lr_fn"] not in (None, *ADJUSTMENTS):
            raise ValueError(
                f"{self._name}: adjust_lr_fn is {group['adjust_lr_fn']!r}, expected None or one of "
                f"{', '.join(ADJUSTMENTS)}"
            )

    def _check_parameters(self, params: list[torch.Tensor]) -> None:
        super()._check_parameters(params)
        for i, param in enumerate(params):
            if param.dim() != 2:
                raise ValueError(
                    f"{self._name}: parameter {i} of a group has shape {tuple(param.shape)}, expected a matrix; "
                    "llmsys.optim.AdamW takes the others"
                )
