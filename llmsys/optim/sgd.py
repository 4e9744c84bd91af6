"""Stochastic gradient descent with momentum, a drop-in for `torch.optim.SGD`, on the fused op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmsys.ops.sgd import sgd
from llmsys.optim._list_optimizer import ListOptimizer, zeros_like


class SGD(ListOptimizer):
    """Stochastic gradient descent, with momentum; `llmsys.ops.sgd` has the formula.

    Takes what `torch.optim.SGD` takes, and state dicts go both ways. Different from it:

    States     momentum_buffer, where there is momentum, is float32 (float64 for float64 parameters)
    Masters    and
    Rounding   as in `llmsys.optim.AdamW`
    Steps      every step is one fused pass: foreach and fused are accepted and change nothing.
               step(grad_scale=…) scales the gradients on the way (see `clip_grad_norm`)
    Errors     ValueError for a value out of range, nesterov without momentum or with dampening, differentiable or a
               sparse gradient; TypeError for parameters that are not floating point
    Source     Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13, in the form torch.optim.SGD computes it
    """

    states = ("momentum_buffer",)
    required = frozenset()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = True,
        stochastic_rounding: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _start(self, group: dict[str, Any], state: dict[str, Any], param: torch.Tensor) -> tuple:
        first = group["momentum"] != 0 and "momentum_buffer" not in state
        if first:
            state["momentum_buffer"] = zeros_like(param)
        return (first,)

    def _update(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, Any]],
        first: bool,
        **settings: Any,
    ) -> None:
        buffers = [state["momentum_buffer"] for state in states] if group["momentum"] != 0 else []
        settings |= {name: group[name] for name in ("momentum", "dampening", "nesterov")}
        sgd(params, grads, buffers, step=1 if first else 2, **settings)  # the first gradient is not dampened

    def _check_settings(self, group: dict[str, Any]) -> None:
        self._check_at_least_zero(group, "momentum")
        self._check_false(group, differentiable="torch.optim.SGD has it")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{self._name}: nesterov with momentum {group['momentum']} and dampening {group['dampening']}, "
                "expected momentum > 0 and no dampening"
            )
