"""Train one model twice, with llmsys and with stock PyTorch, and set the two side by side.

Each run has a process of its own, so that its memory can be told apart. They take turns of a few steps, and the order
of the turns alternates, so that whatever else the machine does slows both alike. A third process, the control, is the
stock run with other roundings: how far it drifts from the stock run in its few steps is how far rounding alone takes
two runs apart.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from llmsys.train.config import TrainConfig
from llmsys.train.trainer import Record
from llmsys.train.worker import Commands, Worker

ENGINES = ("llmsys", "stock")
ROUNDS = 12
CONTROL_FRACTION = 0.1  # of the steps
DRIFT_FACTOR = 4.0  # the drift is a maximum over few steps, of a quantity that doubles from one run to the next
FINAL_FRACTION = 0.1  # of the steps, whose mean is the final loss


@dataclass(frozen=True)
class Run:
    """What one engine did over all steps."""

    records: list[Record]
    validation_loss: float
    extra_bytes: int

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]

    def tokens_per_s(self, warm_up: int) -> float:
        """Median over the steps after the first `warm_up`."""
        return statistics.median(record.tokens_per_s for record in self.records[warm_up:])


@dataclass(frozen=True)
class Agreement:
    """Whether two loss curves differ by no more than rounding and noise make them.

    Drift      over the control's steps: max |llmsys - stock| at most DRIFT_FACTOR times max |control - stock|
    Final      the means of the last steps differ by at most three standard errors of such a mean: the final loss is
               not known better than that
    """

    drift: float
    drift_limit: float
    final: float
    final_limit: float

    @property
    def holds(self) -> bool:
        return self.drift <= self.drift_limit and self.final <= self.final_limit


def agreement(llmsys: list[float], stock: list[float], control: list[float]) -> Agreement:
    """Judge two loss curves by the criterion of `Agreement`."""
    last = final_steps(len(stock))
    error = statistics.stdev(stock[-last:]) / last**0.5
    return Agreement(
        drift=max(abs(a - b) for a, b in zip(llmsys, stock[: len(control)], strict=False)),
        drift_limit=DRIFT_FACTOR * max(abs(a - b) for a, b in zip(control, stock, strict=False)),
        final=abs(statistics.fmean(llmsys[-last:]) - statistics.fmean(stock[-last:])),
        final_limit=3 * error,
    )


def final_steps(steps: int) -> int:
    return max(2, round(steps * FINAL_FRACTION))


def compare(
    config: TrainConfig, tokens: Path, dtype: torch.dtype, weights: Path, console: Console
) -> tuple[dict[str, Run], list[float]]:
    """Train with both engines on the token file `tokens`; returns their runs and the control's losses.

    The weights that llmsys arrives at go to the file `weights`.

    Errors     RuntimeError with a worker's traceback, or its exit code if it died
    """
    workers = {engine: Worker(engine, engine_commands, engine, config, tokens, dtype) for engine in ENGINES}
    control = Worker("control", engine_commands, "control", config, tokens, dtype)
    records: dict[str, list[Record]] = {engine: [] for engine in ENGINES}
    try:
        with Progress(*Progress.get_default_columns(), console=console) as progress:
            bars = {engine: progress.add_task(engine, total=config.steps) for engine in ENGINES}
            control_losses = [record.loss for record in control.ask("steps", control_steps(config.steps))]
            control.close()
            for turn, count in enumerate(turns(config.steps)):
                for engine in ENGINES if turn % 2 == 0 else reversed(ENGINES):
                    records[engine] += workers[engine].ask("steps", count)
                    last = records[engine][-1]
                    status = f"{engine:6} loss {last.loss:.3f} · {last.tokens_per_s:7,.0f} tokens/s"
                    progress.update(bars[engine], advance=count, description=status)
        runs = {
            engine: Run(records[engine], extra_bytes=worker.ask("memory"), validation_loss=worker.ask("validate"))
            for engine, worker in workers.items()
        }
        workers["llmsys"].ask("save", weights)
    finally:
        for worker in (control, *workers.values()):
            worker.close()
    return runs, control_losses


def control_steps(steps: int) -> int:
    return max(2, round(steps * CONTROL_FRACTION))


def turns(steps: int) -> list[int]:
    """How many steps each engine does in each round: about equal, `steps` in all."""
    bounds = [steps * i // ROUNDS for i in range(ROUNDS + 1)]
    return [stop - start for start, stop in zip(bounds, bounds[1:], strict=False) if stop > start]


def engine_commands(name: str, config: TrainConfig, tokens: Path, dtype: torch.dtype) -> Commands:
    """What a worker that trains with this engine answers to."""
    from llmsys.data import TokenFile
    from llmsys.memory import tune_allocator
    from llmsys.models.weights import save_weights
    from llmsys.train.peak_memory import PeakMemory
    from llmsys.train.run import batches
    from llmsys.train.stock import control, stock
    from llmsys.train.trainer import Trainer, fused

    if name == "llmsys":
        tune_allocator()
    token_file = TokenFile(tokens)
    memory = PeakMemory(config.device)
    engine = {"llmsys": fused, "stock": stock, "control": control}[name](config, dtype)
    trainer = Trainer(config, engine, batches(config, token_file, "train"), batches(config, token_file, "validation"))
    return {
        "steps": lambda count: [trainer.step() for _ in range(count)],
        "validate": trainer.validate,
        "memory": memory.extra_bytes,
        "save": lambda path: save_weights(engine.model, path),
    }
