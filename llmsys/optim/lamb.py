"""LAMB on the fused op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmsys.ops.lamb import lamb
from llmsys.optim._list_optimizer import ListOptimizer, zeros_like


class Lamb(ListOptimizer):
    """Adam whose step is scaled, for each parameter, to the length of its weights; `llmsys.ops.lamb` has the formula.

    A state dict of AdamW, this library's or torch's, may be loaded: the moments are the same.

    States     exp_avg and exp_avg_sq are float32 (float64 for float64 parameters) whatever the parameter's dtype
    Masters    and
    Rounding   as in `llmsys.optim.AdamW`
    Steps      step(grad_scale=…) scales the gradients on the way (see `clip_grad_norm`; the authors clip to norm 1)
    Errors     ValueError for a value out of range or a sparse gradient; TypeError for parameters that are not floating
               point
    Source     You et al. 2019, arXiv:1904.00962, algorithm 2, with the identity for φ
    """

    states = ("exp_avg", "exp_avg_sq")
    required = frozenset({"step", *states})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        master_weights: bool = True,
        stochastic_rounding: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _start(self, group: dict[str, Any], state: dict[str, Any], param: torch.Tensor) -> tuple:
        if "exp_avg" not in state:
            state |= {"step": 0, **{name: zeros_like(param) for name in self.states}}
        return (state["step"],)

    def _update(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, Any]],
        step: int,
        **settings: Any,
    ) -> None:
        m, v = ([state[name] for state in states] for name in self.states)
        beta1, beta2 = map(float, group["betas"])
        lamb(params, grads, m, v, beta1=beta1, beta2=beta2, eps=group["eps"], step=step + 1, **settings)

    def _check_settings(self, group: dict[str, Any]) -> None:
        self._check_at_least_zero(group, "eps")
        self._check_betas(group)
