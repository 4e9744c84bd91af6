"""`llmsys bench`: run the benchmarks of a source checkout."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from llmsys.perf import ceilings, report

DTYPES = ("float32", "bfloat16", "float16")

SUITES = ("ops", "train")
Measured = tuple[list[report.Row], list[Any], dict[str, Any]]  # rows, bars, what else the record holds


def bench(
    suite: Annotated[str, typer.Argument(help="What to measure: ops, or train, a whole step.")],
    op: Annotated[list[str] | None, typer.Option(help="An op to measure, repeatable. Default: all.")] = None,
    bars: Annotated[
        bool, typer.Option("--bars", help="Measure what the bars need; print each with its figure.")
    ] = False,
    shape: Annotated[list[str] | None, typer.Option(help="Only this shape, such as 4096x4096.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 instead of each case's own.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Seconds to spend on the rounds of one case.")] = 4.0,
    tune_allocator: Annotated[
        bool, typer.Option("--tune-allocator", help="In a process that keeps freed memory, as one that trains does.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the record here.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write it to benchmarks/records too.")] = False,
) -> None:
    """Time ops against the machine's ceilings and against others. Exit code 1 if any result is wrong.

    Errors     ValueError for an option that names nothing; RuntimeError outside a source checkout
    """
    if suite not in SUITES:
        raise ValueError(f"llmsys.perf.bench: suite {suite!r}, expected one of {', '.join(SUITES)}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"llmsys.perf.bench: --dtype {dtype}, expected one of {', '.join(DTYPES)}")
    checkout, console = Checkout(), Console(width=None if sys.stdout.isatty() else 160)
    environment = report.environment(report.command_line())
    if report.busy(environment):
        console.print(f"[yellow]This machine is busy (load {environment['load']}): times are noise.[/yellow]")
    if suite == "train":
        if op or shape or device != "cpu" or tune_allocator:
            raise ValueError(
                "llmsys.perf.bench: train with --op, --shape, --device or --tune-allocator, expected --dtype at most"
            )
        rows, promised, more = checkout.train(dtype, console)
    else:
        rows, promised, more = checkout.time_ops(
            op, bars, [_shape(text) for text in shape or []], dtype, device, budget, console
        )
    verdicts = [checkout.bars.judge(bar, rows) for bar in promised]
    if verdicts:
        console.print(checkout.bars.table(verdicts))
    measured = ceilings.bandwidth(device)
    console.print(
        f"{environment['machine']['cpu']}, {environment['machine']['threads']} threads, torch {environment['torch']}: "
        f"read {measured.read / 1e9:.1f}, write {measured.write / 1e9:.1f}, copy {measured.copy / 1e9:.1f} GB/s"
    )
    content = report.record(
        environment,
        rows,
        suite=("bars" if bars and suite == "ops" else suite) + ("-tuned" if tune_allocator else ""),
        bandwidth_bytes_per_s={"read": measured.read, "write": measured.write, "copy": measured.copy, **measured.ways},
        bars=[checkout.bars.as_record(verdict) for verdict in verdicts],
        **more,
    )
    for path in [*([json] if json else []), *([report.record_path(content)] if record else [])]:
        report.write_record(path, content)
        console.print(f"wrote {path}")
    if any(row.correct is False for row in rows):
        raise typer.Exit(1)


class Checkout:
    """The benchmarks of this checkout, which are not part of the installed package."""

    def __init__(self) -> None:
        self.folder = report.CHECKOUT / "benchmarks"
        if not (self.folder / "harness.py").exists():
            raise RuntimeError(
                f"llmsys.perf.bench: no benchmarks at {self.folder}, expected a source checkout; "
                "clone the repository and run `pip install -e .` in it"
            )
        if str(report.CHECKOUT) not in sys.path:
            sys.path.insert(0, str(report.CHECKOUT))
        self.bars: ModuleType = import_module("benchmarks.bars")

    def ops(self) -> list[str]:
        return sorted(path.stem.removeprefix("bench_") for path in (self.folder / "ops").glob("bench_*.py"))

    def bench(self, name: str) -> Any:
        return import_module(f"benchmarks.ops.bench_{name}").BENCH

    def time_ops(
        self,
        names: Sequence[str] | None,
        bars: bool,
        shapes: Sequence[tuple[int, ...]],
        dtype: str | None,
        device: str,
        budget_s: float,
        console: Console,
    ) -> Measured:
        """The ops named, by default all: their own plans, or with `bars` the cases that the bars need."""
        for name in names or ():
            if name not in self.ops():
                raise ValueError(f"llmsys.perf.bench: --op {name}, expected one of {', '.join(self.ops())}")
        rows: list[report.Row] = []
        promised: list[Any] = []
        for name in names or self.ops():
            console.print(f"[dim]{name} …[/dim]", highlight=False)
            bench = self.bench(name)
            plan = [*([] if bars else bench.plan), *(bar.case for bar in bench.bars)]
            if shapes:
                plan = [replace(case, shape=shape) for shape in shapes for case in plan]
            if dtype:
                plan = [replace(case, dtype=dtype) for case in plan]
            rows += bench.run(list(dict.fromkeys(plan)), device=device, budget_s=budget_s)
            promised += bench.bars if bars else []
        console.print(report.rows_table(rows))
        return rows, promised, {}

    def train(self, dtype: str | None, console: Console) -> Measured:
        """A whole step in each dtype, or in one."""
        whole_step = import_module("benchmarks.train.whole_step")
        cases = [case for case in whole_step.CASES if dtype in (None, case.dtype)]
        if not cases:
            raise ValueError(f"llmsys.perf.bench: train with --dtype {dtype}, expected bfloat16 or float32")
        results = whole_step.run(cases)
        console.print(whole_step.table(results), whole_step.where_table(results))
        promised = [bar for bar in whole_step.BARS if bar.case in cases]
        return [row for result in results for row in result.rows], promised, whole_step.as_record(results)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"llmsys.perf.bench: --shape {text}, expected positive sizes such as 4096x4096")
    return tuple(int(size) for size in sizes)
