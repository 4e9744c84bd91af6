"""`llmsys train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="a built-in config (demo) or a .yaml, .toml or .json file; then settings, such as optimizer.lr=1e-3",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="text, JSONL or Parquet file, or a folder of them; may be repeated")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="train the same model with stock PyTorch too, and show both")
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="folder of a run to go on with")] = None,
    resume_latest: Annotated[
        bool,
        typer.Option("--resume-latest", help="go on with the run in output=, or begin it: for jobs that are rerun"),
    ] = False,
) -> None:
    """Train a model, or go on training one, and show what it writes.

    By torchrun --nproc-per-node 4 -m llmsys train parallel.pp=2 parallel.tp=2 it is one rank of a job. With
    --max-restarts the job goes on from its latest checkpoint when a rank is lost.
    """
    import dataclasses

    from rich.console import Console

    from llmsys import env
    from llmsys.train import job, run
    from llmsys.train.config_file import load_config

    words = list(words or [])
    source = words.pop(0) if words and "=" not in words[0] else None
    if resume and (source or compare):
        raise ValueError(
            "llmsys.train: --resume with a config or --compare, expected --resume alone; it has its config"
        )
    config = load_config(str(resume / "config.json") if resume else source or "demo", words)
    if resume_latest:
        if resume or compare or config.output is None:
            raise ValueError(
                "llmsys.train: --resume-latest without output= or with --resume or --compare, expected output=<folder>"
            )
        if (Path(config.output) / "config.json").exists():
            resume = Path(config.output)
            config = load_config(str(resume / "config.json"), words)
    if data:
        paths = tuple(str(path) for path in data)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, paths=paths))
    console = Console()
    if compare and env.job():
        raise ValueError("llmsys.train: --compare in a job of ranks, expected one process")
    if compare:
        from llmsys.train.comparison import train_and_compare

        if not train_and_compare(config, console):
            raise typer.Exit(1)
    else:
        train_here = job.train if env.job() else run.train
        train_here(config, console, resume, latest=resume_latest)
