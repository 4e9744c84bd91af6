"""`llmsys train` on each rank of a job that torchrun started."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llmsys import env
from llmsys.memory import tune_allocator
from llmsys.models import Llama, load_weights
from llmsys.parallel import connect, disconnect
from llmsys.parallel.connect import once
from llmsys.perf.ceilings import gemm_rate
from llmsys.train.checkpoint import checkpoint_of
from llmsys.train.config import TrainConfig
from llmsys.train.loop import run
from llmsys.train.ranks import engine, totals
from llmsys.train.run import batches, checkpoint_to_resume, new_folder, prepare_data, settle, show_sample
from llmsys.train.trainer import Trainer


def train(config: TrainConfig, console: Console, resume: Path | None = None, *, latest: bool = False) -> None:
    """As `run.train`, by all ranks together; rank 0 shows and writes.

    After a restart by torchrun it goes on in the folder of the attempt before, from its latest checkpoint.
    Errors     on every rank, those of `connect` and of `run.train`; ValueError for a layout that does not divide;
               CollectiveError, within `parallel.timeout_s`, when a rank is lost
    """
    job = env.job()
    assert job is not None
    tune_allocator()
    console = console if job.rank == 0 else Console(quiet=True)
    given, p = config, config.parallel
    if config.device == "cuda":
        config = dataclasses.replace(config, device=f"cuda:{job.local_rank}")
        torch.cuda.set_device(config.device)
    mesh = connect(
        timeout_s=p.timeout_s,
        connect_timeout_s=p.connect_timeout_s,
        device=config.device,
        same=_flat(dataclasses.asdict(given)) | {"--resume": resume},
        pp=p.pp,
        dp=p.dp,
        tp=p.tp,
        shard=p.shard,
    )
    console.print(f"{mesh}", highlight=False)
    config, dtype, rate = settle(config, console, lambda dtype: totals(mesh, config.device, gemm_rate(dtype))[0])
    trains = engine(config, dtype, mesh)  # refuses a layout that does not divide, before anything is written
    settled = dataclasses.replace(given, precision=config.precision)
    folder = resume or Path(once(lambda: str(new_folder(settled)), keep="folder"))
    once(lambda: prepare_data(config, console) and None)
    tokenizer, tokens = prepare_data(config, Console(quiet=True))
    console.print(f"model: {config.model.num_parameters() / 1e6:.1f} M parameters; run: {folder}")
    train_batches, validation_batches = (
        batches(config, tokens, split, mesh.data.rank, mesh.data.size) for split in ("train", "validation")
    )
    trainer = Trainer(config, trains, train_batches, validation_batches)
    checkpoint = once(lambda: checkpoint_to_resume(folder, required=resume is not None and not latest))
    if checkpoint:
        trainer.restore(Path(checkpoint))
        console.print(f"resumed from {checkpoint}")
    run(trainer, folder, gemm_rate=rate, console=console)
    disconnect()
    if trainer.steps_done == config.steps and mesh.rank == 0:
        if mesh.model.size == 1 and p.zero < 3:
            model = Llama(config.model, device=config.device, dtype=dtype)
            load_weights(model, checkpoint_of(folder / "checkpoints", config.steps) / "model.safetensors")
            show_sample(model, tokenizer, config, console)
        else:
            one = " ".join(f"parallel.{axis}=1" for axis in ("pp", "dp", "tp") if getattr(p, axis) > 1)
            console.print(
                f"The model is in parts; to see it write: llmsys train --resume {folder} {one} parallel.zero=0"
            )


def _flat(config: Any, prefix: str = "") -> dict[str, object]:
    """`{"optimizer": {"lr": 1}}` as `{"optimizer.lr": 1}`."""
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
