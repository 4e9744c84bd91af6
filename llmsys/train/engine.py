"""What a trainer trains with: a model and its optimizer, in one process."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from llmsys.models.llama import Llama
from llmsys.train import checkpoint
from llmsys.train.checkpoint import load_checkpoint, save_checkpoint

Batch = tuple[Tensor, Tensor]  # tokens and targets
Clip = Callable[[Iterable[Tensor], float], tuple[Tensor, Tensor | None]]


class Optimizer(checkpoint.Optimizer, Protocol):
    """What a step asks of an optimizer besides; `llmsys.optim.AdamW` is one."""

    def step(self, *, grad_scale: Any) -> Any: ...

    def zero_grad(self) -> None: ...


@dataclass(frozen=True)
class Engine:
    """What trains: a model, its optimizer, and `clip(parameters, max_norm) -> (norm, grad_scale)`.

    That of a job of ranks (`ranks.RanksEngine`) does the same; all ranks call it alike and get the same numbers.
    """

    model: Llama
    optimizer: Optimizer
    clip: Clip

    first = True  # whether this process writes what a run leaves
    axes: ClassVar[tuple[str, ...]] = ()  # that bytes are sent on

    def backward(self, batches: Sequence[Batch]) -> float:
        """The mean loss of `batches`, whose mean gradient is then there."""
        loss = 0.0
        for tokens_BT, targets_BT in batches:
            part = self.model.loss(tokens_BT, targets_BT) / len(batches)
            part.backward()
            loss += part.item()
        return loss

    def grad_norm(self, max_norm: float) -> tuple[Tensor, Tensor | None]:
        """The norm of the gradient, and what an update must scale it by, if anything."""
        return self.clip(self.model.parameters(), max_norm)

    def update(self, grad_scale: Tensor | None) -> None:
        """Step, and forget the gradient."""
        self.optimizer.step(grad_scale=grad_scale)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        return self.model.loss(*batch).item()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return flag

    def sent(self, counter: Counter[str]) -> dict[str, int]:
        """Bytes that all ranks sent on each of `axes`, of what this one counted."""
        return {}

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
        return save_checkpoint(folder, step, self.model, self.optimizer, state, keep)

    def load(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path, self.model, self.optimizer)
