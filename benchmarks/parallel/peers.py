"""The same training step under llmsys and under PyTorch's own parallelism, on as many ranks, in one run.

    python -m benchmarks.parallel.peers --ranks 2 4

Prints, for each way to be parallel, seconds a step and the peak memory of the rank that holds most, and how many times
as much the peer takes. Both sides train the same module of PyTorch's operators (`model.py`) from the same weights, in
float32, on the same batches, with PyTorch's fused AdamW; a further row runs llmsys's own model and kernels. Ranks are
processes over Gloo, of one thread each.

Right first   losses of three steps, and all gradients of the first, are those of one process in float64: as near as
              twice (gradients: three times) what one process itself errs in float32. What is wrong gets no number.
Time          of a step: from when the last rank is told to when the last one is done. Each contender has ranks of its
              own, which wait while the others' turn is; rounds go round the contenders.
Memory        what the operating system counts, `VmHWM` reset before a step, less the pages of files and what the
              process had before the model: it sees buffers that are made in C++ or in a backend's own threads, which a
              dispatch mode does not. It is taken in other processes than time is, in which freed memory is given back
              at once: it is what is alive, not what an allocator keeps.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks.allocator import keep_freed_memory
from benchmarks.bars import Bar, as_record, judge as judged, table as bars_table
from benchmarks.contest import Case
from benchmarks.parallel.contenders import OUR_KERNELS, OURS, PAIRS, Pair, Setting, adamw, train
from benchmarks.parallel.model import Llama
from benchmarks.parallel.ranks import Commands, Ranks
from llmsys.models.llama import LlamaConfig
from llmsys.ops._verify import judge
from llmsys.perf import report
from llmsys.perf.ceilings import bandwidth
from llmsys.perf.report import Row
from llmsys.perf.timer import Timing, time_interleaved

SETTING = Setting(  # 20.5 M parameters
    config=LlamaConfig(
        vocab_size=8192, dim=384, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, hidden_dim=1024
    ),
    rows=8,
    length=128,
    micros=8,
)
STEPS, WARM_UP, ROUNDS = 3, 3, 21
M_MMAP_THRESHOLD = -3  # of mallopt, from glibc's malloc.h


# ---- on a rank ----


def checks(contender: str, pair: Pair, setting: Setting, truth: str) -> Commands:
    """What a rank answers to that is not timed: "check", then "memory"."""
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16):
        raise RuntimeError("benchmarks.parallel.peers: mallopt refused, expected glibc")
    before = memory_bytes("RssAnon")
    training = train(contender, pair, setting)

    def step(index: int) -> Tensor | None:
        loss = training.backward(*setting.batch(index))
        training.update()
        return loss

    def check() -> tuple[list[Tensor | None], list[str]]:
        """Losses, and what is wrong with gradients."""
        losses = [training.backward(*setting.batch(0))]
        same, true = torch.load(truth, mmap=True)
        faults = []
        for name, gradient, cut in training.gradients():
            expected = [cut.of(each[name]) if cut else each[name] for each in (same, true)]
            verdict = judge(f"d{name}", [(gradient.view_as(expected[0]), *expected)])
            faults += [] if verdict.right else [str(verdict)]
        training.update()
        return losses + [step(index) for index in range(1, STEPS)], faults

    def memory() -> int:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: 5 resets the peak
        for index in range(STEPS, STEPS + 2):
            step(index)
        return memory_bytes("VmHWM") - memory_bytes("RssFile") - memory_bytes("RssShmem") - before

    return {"check": check, "memory": memory}


def memory_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def steps(contender: str, pair: Pair, setting: Setting) -> Commands:
    """What a rank answers to that is timed: "step"."""
    keep_freed_memory()
    training = train(contender, pair, setting)
    batches = [setting.batch(index) for index in range(STEPS)]

    def step(index: int) -> None:
        training.backward(*batches[index])
        training.update()

    return {"step": step}


# ---- one process ----


@dataclass(frozen=True)
class Alone:
    """What one process finds that has all of the model."""

    losses: Tensor  # of the first steps
    rows: Tensor  # the loss of each sequence in them, by itself: how the loss errs shows on more than three numbers
    gradients: dict[str, Tensor]  # of the first step


def alone(setting: Setting, dtype: torch.dtype) -> Alone:
    model = Llama(setting.config, setting.weights(dtype))
    optimizer = adamw(model.parameters())
    losses, rows, gradients = [], [], {}
    for index in range(STEPS):
        tokens, targets = setting.batch(index)
        with torch.no_grad():
            rows += [model.loss(*row) for row in zip(tokens.split(1), targets.split(1), strict=True)]
        losses.append(model.loss(tokens, targets))
        losses[-1].backward()
        gradients = gradients or {name: weight.grad.clone() for name, weight in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return Alone(torch.stack(losses).detach(), torch.stack(rows), gradients)


# ---- all together ----


def run(
    sizes: Sequence[int], pairs: Sequence[Pair] = PAIRS, setting: Setting = SETTING, rounds: int = ROUNDS
) -> list[Row]:
    """Rows of every pair on every number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder) / "truth")
        same, true = (alone(setting, dtype) for dtype in (setting.dtype, torch.float64))
        torch.save((same.gradients, true.gradients), truth)
        return [row for size in sizes for pair in pairs for row in race(pair, size, setting, same, true, truth, rounds)]


def race(pair: Pair, size: int, setting: Setting, same: Alone, true: Alone, truth: str, rounds: int) -> list[Row]:
    """A row for each contender of a pair; those that are right take turns."""
    names = (OURS, pair.peer, OUR_KERNELS)
    wrong: dict[str, str] = {}
    failed: dict[str, str] = {}
    peak_bytes: dict[str, int] = {}
    for name in names:
        try:
            fault, peak_bytes[name] = checked(name, pair, size, setting, same, true, truth)
        except RuntimeError as error:
            failed[name] = str(error).strip().splitlines()[-1]
            continue
        if fault:
            wrong[name] = f"wrong: {fault}"
    right = [name for name in names if name not in failed and name not in wrong]
    timings = timed(right, pair, size, setting, rounds)
    case = case_of(size, setting)
    where: dict[str, Any] = {key: getattr(case, key) for key in ("mode", "direction", "shape", "dtype", "caches")}
    rows = []
    for name in names:
        why_not = wrong.get(name) or failed.get(name)
        row = Row(op=pair.name, impl=name, correct=False if name in wrong else None, why_not=why_not, **where)
        if name in timings:
            row = replace(
                row,
                correct=True,
                median_s=timings[name].median_s,
                quartiles_s=timings[name].quartiles_s,
                rounds=len(timings[name].samples_s),
                peak_bytes=peak_bytes[name],
            )
        if name != pair.peer:
            row = replace(
                row,
                peers={pair.peer: timings[pair.peer].median_s if pair.peer in timings else None},
                peers_peak_bytes={pair.peer: peak_bytes[pair.peer]} if pair.peer in timings else {},
            )
        rows.append(row)
    return rows


def checked(
    name: str, pair: Pair, size: int, setting: Setting, same: Alone, true: Alone, truth: str
) -> tuple[str, int]:
    """What is wrong, nothing if all is right; and the peak memory of the rank that has most.

    Errors     RuntimeError for a contender that cannot run
    """
    ranks = Ranks(name, size, checks, name, pair, setting, truth)
    try:
        found = ranks.ask("check")
        known = [torch.stack(each) for each, _ in found if each[0] is not None]
        losses = torch.stack(known).double().mean(0)
        verdict = judge("losses", [(losses, same.losses, true.losses), (None, same.rows, true.rows)])
        faults = [fault for _, every in found for fault in every] + ([] if verdict.right else [str(verdict)])
        return "; ".join(dict.fromkeys(faults)), max(ranks.ask("memory"))
    finally:
        ranks.close()


def timed(names: Sequence[str], pair: Pair, size: int, setting: Setting, rounds: int) -> dict[str, Timing]:
    """Seconds of a step of each, in rounds that go round all of them."""
    ranks: dict[str, Ranks] = {}
    try:
        for name in names:
            ranks[name] = Ranks(name, size, steps, name, pair, setting)
        calls = {name: partial(each.ask, "step") for name, each in ranks.items()}
        if not calls:
            return {}
        return time_interleaved(calls, num_sets=STEPS, rounds=rounds, min_rounds=rounds, warmup=WARM_UP, budget_s=0.0)
    finally:
        for each in ranks.values():
            each.close()


def case_of(size: int, setting: Setting) -> Case:
    """Its shape is ranks × rows × tokens."""
    return Case("public", "step", (size, setting.rows, setting.length), str(setting.dtype).removeprefix("torch."))


def bars(sizes: Sequence[int], pairs: Sequence[Pair] = PAIRS, setting: Setting = SETTING) -> list[Bar]:
    """No slower than the peer, and no heavier."""
    return [
        Bar(pair.name, case_of(size, setting), measure, 1.0, pair.peer)
        for size in sizes
        for pair in pairs
        for measure in ("times", "memory")
    ]


def table(rows: Sequence[Row]) -> Table:
    """Every contender; where a ratio is above 1, llmsys is faster, or lighter."""
    reasons = {f"{row.impl}, {row.op}: {row.why_not}" for row in rows if row.why_not}
    shown = Table(
        title="ms a step, median (quartiles); MiB of the rank that holds most; ×: the peer's over llmsys's",
        caption=escape("\n".join(sorted(reasons))),
    )
    for heading in ("ranks", "pair", "contender"):
        shown.add_column(heading)
    for heading in ("ms", "×", "MiB", "×"):
        shown.add_column(heading, justify="right")
    previous = None
    for row in rows:
        pair = (str(row.shape[0]), row.op)
        if pair != previous:
            shown.add_section()
        head = [*(("", "") if pair == previous else pair), row.impl]
        previous = pair
        if row.median_s is None or row.quartiles_s is None or row.peak_bytes is None:
            shown.add_row(*head, "–")
            continue
        first, third = (f"{1e3 * seconds:.0f}" for seconds in row.quartiles_s)
        times = [f"{seconds / row.median_s:.2f}" for seconds in row.peers.values() if seconds] or [""]
        lighter = [f"{peak / row.peak_bytes:.2f}" for peak in row.peers_peak_bytes.values()] or [""]
        shown.add_row(
            *head, f"{1e3 * row.median_s:.0f} ({first}–{third})", *times, f"{row.peak_bytes / 2**20:.0f}", *lighter
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    names = [pair.name for pair in PAIRS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write a record there")
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    options = parser.parse_args(arguments)
    pairs = [pair for pair in PAIRS if pair.name in options.pairs]
    environment = report.environment(["python", "-m", "benchmarks.parallel.peers", *sys.argv[1:]])
    rows = run(options.ranks, pairs, rounds=options.rounds)
    verdicts = [judged(bar, rows) for bar in bars(options.ranks, pairs)]
    Console().print(table(rows), bars_table(verdicts))
    content = report.record(
        environment,
        rows,
        suite="parallel-peers",
        bandwidth_bytes_per_s={"copy": bandwidth("cpu").copy},
        bars=[as_record(verdict) for verdict in verdicts],
    )
    for path in filter(None, (options.json, report.record_path(content) if options.record else None)):
        report.write_record(path, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
