"""What the library promises of its speed, as data: each bar with the case that shows it and the figure to reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.contest import Case
from llmsys.perf.report import Row, sizes


@dataclass(frozen=True)
class Bar:
    """`measure` of the op's first implementation that was timed, held against `target`.

    percent      share of the ceiling, at least the target
    times        how many times longer `than` takes, at least the target; `than` is a peer, or another implementation
    extra_us     microseconds more than `than` takes, at most the target
    memory       peak memory as a share of `than`'s, at most the target
    """

    op: str
    case: Case
    measure: str
    target: float
    than: str = ""
    impl: str = ""  # of this implementation instead of the first
    needs: str = ""  # what a machine must have to show it

    @property
    def at_least(self) -> bool:
        return self.measure in ("percent", "times")

    @property
    def unit(self) -> str:
        return {
            "percent": "% of copy bandwidth",
            "times": f"× as fast as {self.than}",
            "extra_us": f"µs more than {self.than}",
            "memory": f"of the peak memory of {self.than}",
        }[self.measure]

    @property
    def promise(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.target:g} {self.unit}"

    @property
    def subject(self) -> str:
        """The case in words; bfloat16 goes without saying."""
        case = self.case
        dtype = "" if case.dtype == "bfloat16" else case.dtype
        return " ".join(filter(None, (self.op, self.impl, case.mode, case.direction, sizes(case.shape), dtype)))


@dataclass(frozen=True)
class Verdict:
    """A bar beside its measured figure; None with the reason where it could not be measured."""

    bar: Bar
    figure: float | None
    why_not: str | None = None

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure >= self.bar.target if self.bar.at_least else self.figure <= self.bar.target


def judge(bar: Bar, rows: Sequence[Row]) -> Verdict:
    """The figure of `bar` among `rows`."""
    group = [row for row in rows if row.op == bar.op and case_of(row) == bar.case]
    timed = {row.impl: row for row in group if row.median_s is not None}
    row = timed.get(bar.impl) if bar.impl else next(iter(timed.values()), None)
    if row is None or row.median_s is None:
        reasons = [f"{row.impl}: {row.why_not}" for row in group if bar.impl in ("", row.impl) and row.why_not]
        return Verdict(bar, None, "; ".join(reasons) or bar.needs and f"needs {bar.needs}" or "not measured")
    if bar.measure == "percent":
        return Verdict(bar, row.ceiling_percent)
    if bar.measure == "memory":
        peer_bytes = row.peers_peak_bytes.get(bar.than)
        if row.peak_bytes is None or peer_bytes is None:
            return Verdict(bar, None, "no memory was measured")
        return Verdict(bar, row.peak_bytes / peer_bytes)
    other_s = timed[bar.than].median_s if bar.than in timed else row.peers.get(bar.than)
    if other_s is None:
        return Verdict(bar, None, f"{bar.than}: {row.peers_why_not.get(bar.than, 'not on this machine')}")
    return Verdict(bar, other_s / row.median_s if bar.measure == "times" else 1e6 * (row.median_s - other_s))


def case_of(row: Row) -> Case:
    return Case(row.mode, row.direction, row.shape, row.dtype, row.caches)


def ready(op: str, direction: str, percent: float, shape: tuple[int, ...] = (4096, 4096)) -> Bar:
    """`op` into outputs that exist reaches this share of the copy bandwidth."""
    return Bar(op, Case("ready", direction, shape), "percent", percent)


def public(op: str, direction: str, shape: tuple[int, ...], times: float, than: str) -> Bar:
    """`op` as a user calls it is so many times as fast as a peer."""
    return Bar(op, Case("public", direction, shape), "times", times, than)


def warm(shape: tuple[int, ...]) -> Case:
    """A public forward whose buffers an op before may have left in the caches."""
    return Case("public", "forward", shape, caches="warm")


def half_on_avx2(op: str) -> tuple[Bar, ...]:
    """AVX2 gives at least half the speed of AVX-512."""
    cases = (Case("ready", direction, (4096, 4096)) for direction in ("forward", "backward"))
    return tuple(Bar(op, case, "times", 0.5, "cpu", "cpu[avx2]", "AVX-512") for case in cases)


def pointwise(op: str) -> tuple[Bar, ...]:
    """What every activation and gated unit is held to."""
    return (
        ready(op, "forward", 80),
        ready(op, "backward", 65),
        *(public(op, direction, (2048, 2048), 1.3, "torch.compile") for direction in DIRECTIONS),
    )


DIRECTIONS = ("forward", "forward+backward")
SMALL = ((16, 64), (16, 1024), (32, 1024))  # 2, 32 and 64 KiB of bfloat16


def table(verdicts: Sequence[Verdict]) -> Table:
    """Every bar with its figure, and whether it is met."""
    shown = Table(title="Bars")
    for heading in ("what", "bar", "measured", ""):
        shown.add_column(heading, no_wrap=heading != "measured")
    for verdict in verdicts:
        shown.add_row(*map(escape, (verdict.bar.subject, verdict.bar.promise, measured(verdict), status(verdict))))
    return shown


def measured(verdict: Verdict) -> str:
    return f"{verdict.figure:.2f}" if verdict.figure is not None else f"not measured: {verdict.why_not}"


def status(verdict: Verdict) -> str:
    return {True: "met", False: "missed", None: "–"}[verdict.met]


def as_record(verdict: Verdict) -> dict[str, Any]:
    bar = verdict.bar
    return {
        "subject": bar.subject,
        "promise": bar.promise,
        "measured": measured(verdict),
        "status": status(verdict),
        "figure": verdict.figure,
        "target": bar.target,
    }
