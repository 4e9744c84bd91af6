"""One optimizer step: gradients of a few batches, clipped, applied."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from llmsys.models.llama import Llama
from llmsys.train.config import OptimizerConfig


class Optimizer(Protocol):
    """What a step asks of an optimizer; `llmsys.optim.AdamW` is one."""

    param_groups: list[dict[str, Any]]

    def step(self, *, grad_scale: Any) -> Any: ...

    def zero_grad(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


Clip = Callable[[Iterable[Tensor], float], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Engine:
    """What trains: a model, its optimizer, and `clip(parameters, max_norm) -> (norm, grad_scale)`."""

    model: Llama
    optimizer: Optimizer
    clip: Clip


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float  # before clipping


def train_step(
    engine: Engine, batches: Sequence[tuple[Tensor, Tensor]], *, lr: float, max_grad_norm: float
) -> StepResult:
    """Average the gradients of `batches`, scale them to a norm of at most `max_grad_norm`, and step.

    Errors     RuntimeError if the loss or the gradient norm is not finite; no weight has changed then
    """
    loss = 0.0
    for tokens_BT, targets_BT in batches:
        part = engine.model.loss(tokens_BT, targets_BT) / len(batches)
        part.backward()
        loss += part.item()
    grad_norm, grad_scale = engine.clip(engine.model.parameters(), max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm.item())):
        raise RuntimeError(
            f"llmsys.train.step: loss {loss} and gradient norm {grad_norm.item()}, expected finite numbers; "
            "lower optimizer.lr or warm up longer"
        )
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.optimizer.step(grad_scale=grad_scale)
    engine.optimizer.zero_grad()
    return StepResult(loss, grad_norm.item())


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of step 0, 1, … `steps` - 1: warm-up, then half a cosine.

    Source     Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, one period
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    final = config.lr * config.final_lr_ratio
    return final + (config.lr - final) * 0.5 * (1 + math.cos(math.pi * progress))
