"""The demo model trained by one process and by four ranks in each layout: one figure, and how far the losses are apart.

    python -m benchmarks.train.layouts --record

Each is a run of `llmsys train` of its own, under torchrun, from the same seed on the same text in the same global
batches; in float32 over Gloo nothing but the order of sums differs. `one process, other sums` is what that alone does
without any parallelism: each batch in two halves, whose gradients are averaged.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsys.perf.report import environment, record, record_path, write_record

RANKS = 4
ALONE, CONTROL = "one process", "one process, other sums"
LAYOUTS = {
    "dp4": "dp=4",
    "dp4, ZeRO-3": "dp=4 zero=3",
    "tp4": "tp=4",
    "pp4, 1F1B": "pp=4 micro_batches=8",
    "pp4, ZB-H1": "pp=4 micro_batches=8 schedule=zb_h1",
    "pp2 · tp2, sequence parallel": "pp=2 tp=2 sequence_parallel=true",
    "pp2 · dp2, interleaved 1F1B, ZeRO-2": "pp=2 dp=2 schedule=interleaved_1f1b chunks_per_stage=2 zero=2",
    "pp2 · dp2, ZB-V, ZeRO-3": "pp=2 dp=2 schedule=zb_v zero=3",
    "dp2 · tp2, ZeRO-1": "dp=2 tp=2 zero=1",
}


def train(words: Sequence[str], ranks: int, folder: Path) -> list[dict[str, float]]:
    """The rows of the log of `llmsys train` with `words` on so many ranks.

    Errors     RuntimeError, with what it printed, if it fails
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "llmsys", "train", *words, f"output={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks.train.layouts: {' '.join(command)}\n{done.stdout}{done.stderr}")
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def runs(steps: int, words: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    common = [f"steps={steps}", "precision=float32", "tensorboard=false", "generated_tokens=1", *words]
    halves = ["data.batch_size=4", "accumulation=2"]
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, ranks: int, own: Sequence[str]) -> None:
            found[name] = train([*common, *own], ranks, Path(folder) / str(len(found)))
            print(f"{name}: loss {found[name][-1]['loss']:.6f}", flush=True)

        run(ALONE, 1, [])
        run(CONTROL, 1, halves)
        for name, layout in LAYOUTS.items():
            run(name, RANKS, [f"parallel.{each}" for each in layout.split()])
    return found


def distance(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, others, strict=True)]


def plot(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """All loss curves in one axis, which lie on each other, and below how far each is from one process."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (losses, apart) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 8), height_ratios=(3, 2), layout="constrained"
    )
    alone = curves[ALONE]
    steps = range(1, len(alone) + 1)
    for index, (name, curve) in enumerate(curves.items()):
        style = {"color": f"C{index % 10}", "linewidth": 1.2, "linestyle": (0, (4, len(curves) - index))}
        losses.plot(
            steps, curve, label=f"{name}: {curve[-1]:.4f}", **(style | {"linestyle": "-"} if not index else style)
        )
        if index:
            away = distance(curve, alone)
            label = f"{name}: at most {max(away):.1e}"
            apart.semilogy(steps, [value or None for value in away], label=label, color=f"C{index % 10}", linewidth=1)
    losses.set_ylabel("training loss (nats)")
    losses.legend(title="after the last step", fontsize="small")
    apart.set_ylabel(f"|loss - loss of {ALONE}|")
    apart.set_xlabel("step")
    apart.legend(fontsize="x-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def content_of(found: Mapping[str, list[dict[str, float]]], command: Sequence[str]) -> dict[str, Any]:
    """The record: losses, the largest distance from one process, and what each layout sent on each axis, a step."""
    losses = {name: [row["loss"] for row in rows] for name, rows in found.items()}
    return record(
        environment(command) | {"suite": "layouts"},
        [],
        layouts=LAYOUTS,
        losses=losses,
        # The control's batches are half as large: its validation is of other text.
        validation_losses={name: rows[-1]["validation_loss"] for name, rows in found.items() if name != CONTROL},
        largest_distance={name: max(distance(curve, losses[ALONE])) for name, curve in losses.items()},
        bytes_per_step={
            name: {key: int(value) for key, value in rows[-1].items() if key.endswith("_bytes")}
            for name, rows in found.items()
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train.layouts", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--record", action="store_true", help="keep losses and figure in benchmarks/records")
    parser.add_argument("--figure", type=Path, default=Path("runs/layouts.png"))
    parser.add_argument("words", nargs="*", help="settings of llmsys train, such as data.sequence_length=128")
    options = parser.parse_args(arguments)
    found = runs(options.steps, options.words)
    content = content_of(found, ["python", "-m", "benchmarks.train.layouts", *sys.argv[1:]])
    figure = options.figure
    if options.record:
        path = record_path(content)
        write_record(path, content)
        figure = path.with_suffix(".png")
    plot(content["losses"], figure)
    print(f"{'':38} {'last loss':>10} {'validation':>10} {'apart, at most':>14}  bytes sent a step")
    for name, losses in content["losses"].items():
        sent = ", ".join(
            f"{key.removesuffix('_bytes')} {n:,}" for key, n in content["bytes_per_step"][name].items() if n
        )
        validation = content["validation_losses"].get(name, float("nan"))
        print(f"{name:38} {losses[-1]:10.6f} {validation:10.6f} {content['largest_distance'][name]:14.1e}  {sent}")
    print(f"figure: {figure}")


if __name__ == "__main__":
    main()
