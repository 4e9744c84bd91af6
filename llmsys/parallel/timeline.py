"""When each action of a pipeline starts and ends, and how long stages stand idle."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llmsys.parallel.dependencies import needs, walk
from llmsys.parallel.schedule import Action, Actions


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of one microbatch in a chunk (one figure for all chunks or one for each), and of a hop between stages.

    A stage does not wait while it sends. Where nothing is split, B takes backward_s + weight_s.
    """

    forward_s: float | Sequence[float]
    backward_s: float | Sequence[float]
    weight_s: float | Sequence[float]
    hop_s: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """Start and end of each action, by stage and index, in seconds."""

    start_s: tuple[tuple[float, ...], ...]
    end_s: tuple[tuple[float, ...], ...]

    @cached_property
    def total_s(self) -> float:
        """From the first start to the last end."""
        return max(row[-1] for row in self.end_s) - min(row[0] for row in self.start_s)

    @cached_property
    def span_s(self) -> tuple[float, ...]:
        """From the first start to the last end of each stage."""
        return tuple(end[-1] - start[0] for start, end in zip(self.start_s, self.end_s, strict=True))

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds each stage works."""
        return tuple(sum(end) - sum(start) for start, end in zip(self.start_s, self.end_s, strict=True))

    @cached_property
    def bubble_rate(self) -> float:
        """The share of the longest span in which stages stand idle, on average over them.

        Where stages have equal work this is (cost − m(F + B + W)) / cost.

        Source: Qi et al. 2023, arXiv:2401.10241, table 5
        """
        return 1 - sum(self.busy_s) / len(self.busy_s) / max(self.span_s)


def timeline(actions: Actions, costs: Costs) -> Timeline:
    """Each action starts when its stage is free and what it needs has come.

    Errors     ValueError for a stage without actions, costs of another number of chunks, a deadlock
    """
    if not all(actions):
        empty = next(stage for stage, row in enumerate(actions) if not row)
        raise ValueError(f"llmsys.parallel.timeline: stage {empty} has no actions, expected at least one")
    chunks = 1 + max(action.chunk for row in actions for action in row)
    forward, backward, weight = (
        _by_chunk(name, getattr(costs, name), chunks) for name in ("forward_s", "backward_s", "weight_s")
    )
    if not any(action.kind == "W" for row in actions for action in row):
        backward = [b + w for b, w in zip(backward, weight, strict=True)]
    seconds = {"F": forward, "B": backward, "W": weight}

    ended: dict[Action, tuple[int, float]] = {}
    starts: list[list[float]] = [[] for _ in actions]
    ends: list[list[float]] = [[] for _ in actions]
    for stage, _, action in walk(actions):
        start = ends[stage][-1] if ends[stage] else 0.0
        for need in needs(action, chunks):
            other, end = ended[need]
            start = max(start, end + (costs.hop_s if other != stage else 0.0))
        end = start + seconds[action.kind][action.chunk]
        ended[action] = (stage, end)
        starts[stage].append(start)
        ends[stage].append(end)
    return Timeline(tuple(map(tuple, starts)), tuple(map(tuple, ends)))


def _by_chunk(name: str, cost: float | Sequence[float], chunks: int) -> list[float]:
    if not isinstance(cost, Sequence):
        return [cost] * chunks
    if len(cost) != chunks:
        raise ValueError(
            f"llmsys.parallel.timeline: {len(cost)} costs in {name}, expected {chunks}, one for each chunk"
        )
    return list(cost)
