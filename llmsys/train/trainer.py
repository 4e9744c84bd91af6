"""A training run in memory: model, optimizer and data position, stepped, validated, saved and restored together."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from llmsys.data import PackedBatches
from llmsys.models.llama import Llama
from llmsys.optim import AdamW, clip_grad_norm
from llmsys.parallel import counted
from llmsys.train.checkpoint import random_state, set_random_state
from llmsys.train.config import TrainConfig
from llmsys.train.engine import Engine
from llmsys.train.step import learning_rate, train_step


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one step did; `step` counts from 1."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    tokens_per_s: float
    sent_bytes: dict[str, int] = field(default_factory=dict)  # by all ranks of a job, on each axis


def fused(config: TrainConfig, dtype: torch.dtype) -> Engine:
    """llmsys's own ops and optimizer; weights of lower precision have float32 masters in the optimizer."""
    model = build_model(config, dtype)
    c = config.optimizer
    optimizer = AdamW(decay_groups(model, c.weight_decay), lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    return Engine(model, optimizer, clip_grad_norm)


def build_model(config: TrainConfig, dtype: torch.dtype) -> Llama:
    model = Llama(config.model, seed=config.seed, device=config.device, dtype=dtype)
    if config.accumulation > 1:
        for weight in model.parameters():
            weight.grad_dtype = torch.promote_types(
                dtype, torch.float32
            )  # a sum of bfloat16 gradients loses what is 2^-8 of it
    return model


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: matrices decay, the weights of norms do not."""
    weights = list(model.parameters())
    return [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
    ]


class Trainer:
    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        train_batches: PackedBatches,
        validation_batches: PackedBatches,
    ):
        self.config, self.engine, self.model = config, engine, engine.model
        self.train_batches, self.validation_batches = train_batches, validation_batches
        self.steps_done = 0

    def step(self) -> Record:
        """The next optimizer step."""
        start = time.perf_counter()
        lr = learning_rate(self.steps_done, self.config.steps, self.config.optimizer)
        batches = [self._to_device(next(self.train_batches)) for _ in range(self.config.accumulation)]
        with counted() as counter:
            result = train_step(self.engine, batches, lr=lr, max_grad_norm=self.config.optimizer.max_grad_norm)
        seconds = time.perf_counter() - start
        self.steps_done += 1
        return Record(
            step=self.steps_done,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            seconds=seconds,
            tokens_per_s=self.config.tokens_per_step / seconds,
            sent_bytes=self.engine.sent(counter),
        )

    def validate(self) -> float:
        """Mean loss of the first `validation_batches` batches of the validation split, always the same ones."""
        start = self.validation_batches.state_dict()
        batches = [self._to_device(next(self.validation_batches)) for _ in range(self.config.validation_batches)]
        self.validation_batches.load_state_dict(start)
        return sum(self.engine.evaluate(batch) for batch in batches) / len(batches)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint under `folder`; a run restored from it goes on bit for bit as this one."""
        state = {
            "config": dataclasses.asdict(self.config),
            "data": self.train_batches.state_dict(),
            "random": random_state(),
        }
        return self.engine.save(folder, self.steps_done, state, self.config.keep_checkpoints)

    def restore(self, checkpoint: Path) -> None:
        """Go on from `checkpoint`.

        Errors     ValueError if it is damaged, or of a run with another model, data or seed
        """
        model = dataclasses.asdict(self.config.model)
        state = self.engine.load(checkpoint)
        if state["config"]["model"] != model:
            raise ValueError(
                f"llmsys.train.restore: {checkpoint} is of model {state['config']['model']}, expected {model}"
            )
        self.train_batches.load_state_dict(state["data"])
        set_random_state(state["random"])
        self.steps_done = state["step"]

    def _to_device(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_BT, targets_BT = batch
        return tokens_BT.to(self.config.device), targets_BT.to(self.config.device)
