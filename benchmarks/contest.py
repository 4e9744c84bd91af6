"""What is measured, who competes, and the race: rows out of interleaved rounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsys.perf.ceilings import NATIVE_BLOCK_BYTES, bandwidth, copier
from llmsys.perf.report import Row
from llmsys.perf.roofline import percent
from llmsys.perf.timer import Timed, last_level_cache_bytes, sets_for_cold_caches, time_interleaved

if TYPE_CHECKING:
    from benchmarks.bars import Bar
    from benchmarks.peers import Peer


@dataclass(frozen=True)
class Case:
    """What is measured. `caches="warm"` keeps one set of buffers, for sizes that a previous op leaves in the caches."""

    mode: str
    direction: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    caches: str = "cold"

    def __str__(self) -> str:
        return f"{self.mode} {self.direction} {'x'.join(map(str, self.shape))} {self.dtype}"


@dataclass
class Contest:
    """What competes in one case: by name, a callable to time or the reason why it cannot be."""

    op: str
    case: Case
    num_sets: int = 1
    sets: list = field(default_factory=list)  # the buffers, where implementations and peers share them
    bytes: int = 0
    flops: int = 0
    implementations: dict[str, Timed | str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    peers: dict[str, Timed | str] = field(default_factory=dict)

    def enter(self, name: str, call: Timed, fault: str | None) -> None:
        """Take an implementation in, or bar it because its results are wrong."""
        if fault:
            self.wrong.add(name)
        self.implementations[name] = f"wrong: {fault}" if fault else call


@dataclass(frozen=True)
class Bench:
    """A benchmark: the cases it measures by itself, what competes in a case, everyone's name, and what is promised."""

    op: str
    plan: Sequence[Case]
    contests: Callable[[Case, str], Iterable[Contest]]
    names: Sequence[str]
    peers: Sequence[Peer] = ()
    bars: Sequence[Bar] = ()

    def run(self, plan: Iterable[Case] | None = None, *, device: str = "cpu", budget_s: float = 4.0) -> list[Row]:
        """Rows of every case of `plan`, by default its own; `budget_s` seconds of rounds for each contest."""
        plan = self.plan if plan is None else plan
        return [
            row
            for case in plan
            for contest in self.contests(case, device)
            for row in time_contest(contest, device, budget_s)
        ]


def time_contest(contest: Contest, device: str = "cpu", budget_s: float = 4.0) -> list[Row]:
    """One row per implementation; one without a time says why.

    A plain copy takes part in cold cases. The ceiling is the best copy of these rounds or of the whole run.
    """
    case = contest.case
    calls = {("impl", name): call for name, call in contest.implementations.items() if callable(call)}
    calls |= {("peer", name): call for name, call in contest.peers.items() if callable(call)}
    cold = case.caches == "cold" and contest.bytes > 0
    if cold and calls:
        calls[("copy", "")], copied_bytes = _copy(contest.bytes, device)
    timings = time_interleaved(calls, num_sets=contest.num_sets, device=device, budget_s=budget_s) if calls else {}
    peers = {name: timings[("peer", name)].median_s if callable(call) else None for name, call in contest.peers.items()}
    copy = timings.get(("copy", ""))
    ceiling = max(bandwidth(device).copy, copied_bytes / min(copy.samples_s)) if copy else None
    rows = []
    for name, call in contest.implementations.items():
        timing = timings.get(("impl", name))
        share = percent(contest.bytes / ceiling, timing.median_s) if timing and ceiling else None
        rows.append(
            Row(
                op=contest.op,
                impl=name,
                mode=case.mode,
                direction=case.direction,
                shape=case.shape,
                dtype=case.dtype,
                caches=case.caches,
                median_s=timing.median_s if timing else None,
                quartiles_s=timing.quartiles_s if timing else None,
                rounds=len(timing.samples_s) if timing else 0,
                bytes=contest.bytes,
                flops=contest.flops,
                ceiling_percent=share,
                copy_bytes_per_s=copied_bytes / copy.median_s if copy else None,
                peers=peers,
                peers_why_not={name: reason for name, reason in contest.peers.items() if isinstance(reason, str)},
                correct=False if name in contest.wrong else True if timing else None,
                why_not=call if isinstance(call, str) else None,
            )
        )
    return rows


def _copy(like_bytes: int, device: str) -> tuple[Timed, int]:
    """A copy that moves about `like_bytes`, but four caches' worth at most; and the bytes it does move."""
    unit = 2 * NATIVE_BLOCK_BYTES
    num_bytes = max(unit, min(like_bytes, 4 * last_level_cache_bytes(device)) // unit * unit)
    copies = [copier(num_bytes, device) for _ in range(sets_for_cold_caches(num_bytes, device))]
    return lambda index: copies[index % len(copies)](), num_bytes


def rotating(call: Timed, num_sets: int) -> Callable[[], object]:
    """`call` without arguments, each time on the next set of buffers."""
    indices: Iterator[int] = itertools.cycle(range(num_sets))
    return lambda: call(next(indices))
