"""Lion on the fused op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmsys.ops.lion import lion
from llmsys.optim._list_optimizer import ListOptimizer, zeros_like


class Lion(ListOptimizer):
    """Lion, whose steps have one size in every element; `llmsys.ops.lion` has the formula.

    Takes what the authors' Lion and `lion_pytorch.Lion` take. Its lr is a third to a tenth of AdamW's, its weight_decay
    as many times larger.

    States     exp_avg is float32 (float64 for float64 parameters) whatever the parameter's dtype
    Masters    and
    Rounding   as in `llmsys.optim.AdamW`
    Steps      every step is one fused pass; step(grad_scale=…) scales the gradients on the way (see `clip_grad_norm`)
    Errors     ValueError for a value out of range or a sparse gradient; TypeError for parameters that are not floating
               point
    Source     Chen et al. 2023, arXiv:2302.06675, algorithm 2
    """

    states = ("exp_avg",)
    required = frozenset(states)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master_weights: bool = True,
        stochastic_rounding: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _start(self, group: dict[str, Any], state: dict[str, Any], param: torch.Tensor) -> tuple:
        if "exp_avg" not in state:
            state["exp_avg"] = zeros_like(param)
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
        beta1, beta2 = map(float, group["betas"])
        lion(params, grads, [state["exp_avg"] for state in states], beta1=beta1, beta2=beta2, **settings)

    def _check_settings(self, group: dict[str, Any]) -> None:
        self._check_betas(group)
