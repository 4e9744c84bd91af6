"""From a config to a trained model and a paragraph of its text: what `llmsys train` does."""

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from llmsys.data import PackedBatches, TokenFile, Tokenizer, documents, prepare, python_corpus
from llmsys.infer import Sampler, generate
from llmsys.memory import tune_allocator
from llmsys.models.llama import Llama
from llmsys.perf.ceilings import gemm_rate
from llmsys.train.checkpoint import latest_checkpoint
from llmsys.train.config import TrainConfig
from llmsys.train.loop import run
from llmsys.train.precision import choose_precision
from llmsys.train.trainer import Trainer, fused

CACHE = Path("runs/cache")  # tokenizers and token files, found again by the content they were made from


def prepare_data(config: TrainConfig, console: Console) -> tuple[Tokenizer, TokenFile]:
    """The tokenizer and the tokens of the run's corpus, made once and then found again."""
    data = config.data
    corpus = documents(data.paths) if data.paths else python_corpus(data.max_bytes)
    console.print(f"data: {corpus.description}")
    return prepare(corpus, CACHE, vocab_size=config.model.vocab_size)


def batches(config: TrainConfig, tokens: TokenFile, split: str, rank: int = 0, world_size: int = 1) -> PackedBatches:
    return PackedBatches(
        tokens,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        split=split,
    )


def settle(
    config: TrainConfig, console: Console, rate_of: Callable[[torch.dtype], float] | None = None
) -> tuple[TrainConfig, torch.dtype, float]:
    """`config` with its precision decided, the dtype of that, and the flop/s of matrix products in it.

    `rate_of` measures those of a dtype; by default this process's.

    Errors     RuntimeError if the device is not there
    """
    if config.device != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(
            f"llmsys.train: device={config.device} where torch finds no GPU, expected one; set device=cpu"
        )
    rate_of = rate_of or (lambda dtype: gemm_rate(dtype, config.device))
    precision = choose_precision(config.precision, rate_of)
    rate = rate_of(precision.dtype)
    name = str(precision.dtype).removeprefix("torch.")
    console.print(f"precision: {name} ({precision.reason}); matrix products reach {rate / 1e9:.0f} GFLOP/s")
    return dataclasses.replace(config, precision=name), precision.dtype, rate


def new_folder(config: TrainConfig) -> Path:
    """The run's folder, made, with its config in it.

    Errors     ValueError if a run is there already
    """
    folder = Path(config.output or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if (folder / "config.json").exists():
        raise ValueError(
            f"llmsys.train: output={folder} holds a run already, expected a new folder; "
            f"go on with it by --resume {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1), encoding="utf-8")
    return folder


def checkpoint_to_resume(folder: Path, *, required: bool) -> str | None:
    """The run's latest checkpoint.

    Errors     ValueError if there is none, and one is required
    """
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if required and checkpoint is None:
        raise ValueError(f"llmsys.train: --resume {folder}: no checkpoint in it, expected one")
    return None if checkpoint is None else str(checkpoint)


def train(config: TrainConfig, console: Console, resume: Path | None = None, *, latest: bool = False) -> None:
    """Train in a new folder, or go on in the folder `resume` from its latest checkpoint; show what the model writes.

    latest     begin where there is no checkpoint yet
    Errors     ValueError for a layout of several ranks: `job.train` is for those
    """
    if config.parallel.num_ranks > 1:
        raise ValueError(
            f"llmsys.train: parallel.pp · dp · tp is {config.parallel.num_ranks} ranks and this is one process, "
            f"expected torchrun --nproc-per-node {config.parallel.num_ranks} -m llmsys train …"
        )
    if config.parallel.micros > 1:
        raise ValueError(
            f"llmsys.train: parallel.micro_batches={config.parallel.micros} in one process, expected 1; for the same "
            "in less memory lower data.batch_size and raise accumulation"
        )
    tune_allocator()
    config, dtype, rate = settle(config, console)
    folder = resume or new_folder(config)
    tokenizer, tokens = prepare_data(config, console)
    console.print(f"model: {config.model.num_parameters() / 1e6:.1f} M parameters; run: {folder}")
    trainer = Trainer(
        config, fused(config, dtype), batches(config, tokens, "train"), batches(config, tokens, "validation")
    )
    if resume and (checkpoint := checkpoint_to_resume(resume, required=not latest)):
        trainer.restore(Path(checkpoint))
        console.print(f"resumed from {checkpoint}")
    run(trainer, folder, gemm_rate=rate, console=console)
    if trainer.steps_done == config.steps:
        show_sample(trainer.model, tokenizer, config, console)


def show_sample(model: Llama, tokenizer: Tokenizer, config: TrainConfig, console: Console) -> None:
    """Print what `model` writes after the config's prompt."""
    text = generate(
        model,
        tokenizer,
        config.prompt,
        max_tokens=config.generated_tokens,
        sampler=Sampler(temperature=0.8, top_k=40, top_p=0.95),
        seed=config.seed,
    )
    console.rule("the model writes")
    console.print(f"[bold]{config.prompt}[/bold]", end="")
    console.print(text, markup=False, highlight=False)
