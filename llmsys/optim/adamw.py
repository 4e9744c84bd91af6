"""AdamW, a drop-in for `torch.optim.AdamW`, on the fused op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmsys.ops.adamw import adamw
from llmsys.optim._list_optimizer import ListOptimizer, zeros_like


class AdamW(ListOptimizer):
    """Adam with decoupled weight decay; `llmsys.ops.adamw` has the formula.

    Takes what `torch.optim.AdamW` takes, and state dicts go both ways. Different from it:

    States     exp_avg and exp_avg_sq are float32 (float64 for float64 parameters) whatever the parameter's dtype
    Masters    master_weights=True keeps float32 weights beside each bfloat16 or float16 parameter: updates add up in
               them, the parameter is their rounding. They are taken from the parameter at its first step: load weights
               before that, or delete the parameter's "master" from `state`. torch.optim.AdamW ignores them, and what it
               saves makes new ones
    Rounding   stochastic_rounding=seed rounds bfloat16 parameters up or down at random instead, so that updates add up
               in the mean, and keeps no masters of them: 4 bytes an element less. Each step has other random numbers;
               the same seed, parameters and steps give the same bits
    Steps      every step is one fused pass: foreach and fused are accepted and change nothing.
               step(grad_scale=…) scales the gradients on the way (see `clip_grad_norm`)
    Errors     ValueError for a value out of range, amsgrad, capturable, differentiable or a sparse gradient; TypeError
               for parameters that are not floating point
    Source     Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2
    """

    states = ("exp_avg", "exp_avg_sq")
    required = frozenset({"step", *states})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = True,
        stochastic_rounding: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _start(self, group: dict[str, Any], state: dict[str, Any], param: torch.Tensor) -> tuple:
        if "exp_avg" not in state:
            state["step"] = 0
            self._start_moments(state, param)
        return state["step"], state["exp_avg"].dtype

    def _start_moments(self, state: dict[str, Any], param: torch.Tensor) -> None:
        for name in self.states:
            state[name] = zeros_like(param)

    def _update(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, Any]],
        step: int,
        *_: Any,
        **settings: Any,
    ) -> None:
        beta1, beta2 = map(float, group["betas"])
        settings |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "step": step + 1}
        self._call(params, grads, states, **settings)

    def _call(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict[str, Any]], **settings: Any
    ) -> None:
        adamw(params, grads, *([state[name] for state in states] for name in self.states), **settings)

    def _check_settings(self, group: dict[str, Any]) -> None:
        self._check_at_least_zero(group, "eps")
        self._check_betas(group)
        self._check_false(
            group,
            amsgrad="torch.optim.AdamW has it",
            capturable="the step count is kept on the host",
            differentiable="torch.optim.AdamW has it",
        )
