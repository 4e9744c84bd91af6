"""One optimizer step: gradients of a few batches, clipped, applied."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmsys.train.config import OptimizerConfig
from llmsys.train.engine import Batch, Engine


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float  # before clipping


def train_step(engine: Engine, batches: Sequence[Batch], *, lr: float, max_grad_norm: float) -> StepResult:
    """Average the gradients of `batches`, scale them to a norm of at most `max_grad_norm`, and step.

    Errors     RuntimeError if the loss or the gradient norm is not finite; no weight has changed then
    """
    loss = engine.backward(batches)
    grad_norm, grad_scale = engine.grad_norm(max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm.item())):
        raise RuntimeError(
            f"llmsys.train.step: loss {loss} and gradient norm {grad_norm.item()}, expected finite numbers; "
            "lower optimizer.lr or warm up longer"
        )
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.update(grad_scale)
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
