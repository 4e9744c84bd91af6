"""The training loop: steps, with a progress bar, logs, checkpoints, and a graceful stop."""

import signal
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmsys.parallel import CollectiveError
from llmsys.train.logs import Logs
from llmsys.train.trainer import Record, Trainer

RECENT = 10  # steps whose median speed the progress bar shows


def run(trainer: Trainer, folder: Path, *, gemm_rate: float, console: Console) -> list[Record]:
    """Train to the last step, or to the first Ctrl-C, and leave a checkpoint under `folder`/checkpoints.

    `gemm_rate` is the flop/s of matrix products on this machine in the model's dtype, the denominator of MFU; in a job,
    of all its ranks, which train together and of which the first writes and shows.
    """
    config, engine = trainer.config, trainer.engine
    flops_per_token = config.model.flops_per_token(config.data.sequence_length)
    logs = None
    if engine.first:
        resume_from = trainer.steps_done
        logs = Logs(folder, tensorboard=config.tensorboard, resume_from=resume_from, axes=engine.axes)
    checkpoints = folder / "checkpoints"
    records: list[Record] = []
    recent: deque[float] = deque(maxlen=RECENT)
    saved, stopped = trainer.steps_done, False
    try:
        with _interrupts() as interrupted, _progress(console) as progress:
            bar = progress.add_task("", total=config.steps, completed=trainer.steps_done, status="")
            while trainer.steps_done < config.steps and not stopped:
                record = trainer.step()
                records.append(record)
                recent.append(record.tokens_per_s)
                last = record.step == config.steps
                validation_loss = trainer.validate() if last or _due(record.step, config.validate_every) else None
                if logs:
                    logs.write(record, flops_per_token * record.tokens_per_s / gemm_rate, validation_loss)
                if last or _due(record.step, config.checkpoint_every):
                    trainer.save(checkpoints)
                    saved = record.step
                speed = statistics.median(recent)
                mfu = flops_per_token * speed / gemm_rate
                status = f"loss {record.loss:.3f} · {speed:,.0f} tokens/s · MFU {mfu:.0%}"
                progress.update(bar, completed=record.step, status=status)
                if validation_loss is not None:
                    progress.console.print(f"step {record.step}: validation loss {validation_loss:.4f}")
                stopped = engine.any(bool(interrupted))
            if saved != trainer.steps_done:
                trainer.save(checkpoints)
    finally:
        if logs:
            logs.close()
    if stopped:
        console.print(
            f"Stopped after step {trainer.steps_done} of {config.steps}; go on with: llmsys train --resume {folder}"
        )
    return records


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that holds the first SIGINT or SIGTERM; the second acts as usual.

    A lost rank leaves this so: torchrun then sends SIGTERM to the others, which must not keep them from saying what
    they waited for.
    """
    received: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in usual:
        signal.signal(number, receive)
    lost = False
    try:
        yield received
    except CollectiveError:
        lost = True
        raise
    finally:
        if not lost:
            restore()


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
