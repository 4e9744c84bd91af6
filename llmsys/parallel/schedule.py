"""Pipeline schedules as data: for each stage the list of actions that it runs in turn.

A schedule is one short function and one entry in `SCHEDULES`. The runtime executes the lists, `verify` proves them,
`timeline` times them, `gantt` draws them, and `read_csv` and `write_csv` exchange them with PyTorch.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple


class Action(NamedTuple):
    """One piece of work of one stage. Where a schedule does not split backward, B is the whole of it."""

    kind: str  # "F" forward, "B" backward for the input, "W" backward for the weights
    micro: int  # microbatch index
    chunk: int  # which run of the model's blocks, counted from the input to the loss; a stage holds one or several

    def __str__(self) -> str:
        return f"{self.kind}{self.micro} of chunk {self.chunk}"


Actions = Sequence[Sequence[Action]]  # by stage


def alternate(
    forwards: Sequence[tuple[int, int]], backwards: Sequence[tuple[int, int]], warmup: int, delay: int | None = None
) -> list[Action]:
    """`warmup` forwards, then a backward and a forward in turn, of these (micro, chunk).

    With a `delay` backward is split, and each W comes that many B after its own.
    """
    actions = [Action("F", *one) for one in forwards[:warmup]]
    for i, one in enumerate(backwards):
        actions.append(Action("B", *one))
        if delay is not None and i >= delay:
            actions.append(Action("W", *backwards[i - delay]))
        actions += [Action("F", *one) for one in forwards[warmup + i : warmup + i + 1]]
    late = [] if delay is None else backwards[max(0, len(backwards) - delay) :]
    return actions + [Action("W", *one) for one in late]


def gpipe(stage: int, stages: int, micros: int) -> list[Action]:
    """All forwards, then all backwards, in the same order. Source: Huang et al. 2019, arXiv:1811.06965, fig. 2c."""
    micro_chunks = [(micro, stage) for micro in range(micros)]
    return alternate(micro_chunks, micro_chunks, warmup=micros)


def breadth_first(stage: int, stages: int, micros: int, chunks_per_stage: int) -> list[Action]:
    """GPipe over several chunks a stage, dealt round: all microbatches are through a chunk before the next.

    Source: Lamy-Poirier 2022, arXiv:2211.05953.
    """
    own = range(stage, stages * chunks_per_stage, stages)
    forwards = [(micro, chunk) for chunk in own for micro in range(micros)]
    backwards = [(micro, chunk) for chunk in own[::-1] for micro in range(micros)]
    return alternate(forwards, backwards, warmup=len(forwards))


def one_f_one_b(stage: int, stages: int, micros: int) -> list[Action]:
    """1F1B: no forward runs further ahead than the way to the loss and back is long.

    Source: Narayanan et al. 2021, arXiv:2104.04473, fig. 4 (top).
    """
    micro_chunks = [(micro, stage) for micro in range(micros)]
    return alternate(micro_chunks, micro_chunks, warmup=stages - stage)


def interleaved_1f1b(stage: int, stages: int, micros: int, chunks_per_stage: int) -> list[Action]:
    """1F1B over several chunks a stage, dealt round: a group of microbatches is through all chunks before the next.

    Groups are of `stages` microbatches; where that does not divide, of a few more, as even as can be.

    Source: Narayanan et al. 2021, arXiv:2104.04473, fig. 4 (bottom) and section 2.2.
    """
    groups = max(1, micros // stages)
    bounds = [micros * group // groups for group in range(groups + 1)]
    largest = -(-micros // groups)
    own = range(stage, stages * chunks_per_stage, stages)

    def through(chunks: Sequence[int]) -> list[tuple[int, int]]:
        return [
            (micro, chunk)
            for first, stop in zip(bounds[:-1], bounds[1:], strict=True)
            for chunk in chunks
            for micro in range(first, stop)
        ]

    warmup = (chunks_per_stage - 1) * largest + 2 * (stages - stage) - 1
    return alternate(through(own), through(own[::-1]), warmup)


def zb_h1(stage: int, stages: int, micros: int) -> list[Action]:
    """1F1B with each W put off to fill a bubble, as far as no stage holds more than 1F1B's first.

    Source: Qi et al. 2023, arXiv:2401.10241, section 2.1, fig. 3 (top).
    """
    micro_chunks = [(micro, stage) for micro in range(micros)]
    return alternate(micro_chunks, micro_chunks, warmup=stages - stage, delay=stage)


def zb_h2(stage: int, stages: int, micros: int) -> list[Action]:
    """Forwards enough that no stage waits for its first gradient: no bubble where F, B and W last alike.

    Source: Qi et al. 2023, arXiv:2401.10241, section 2.2, fig. 3 (bottom).
    """
    micro_chunks = [(micro, stage) for micro in range(micros)]
    return alternate(micro_chunks, micro_chunks, warmup=2 * (stages - stage) - 1, delay=2 * stage)


def zb_v(stage: int, stages: int, micros: int) -> list[Action]:
    """Two chunks a stage, down the stages and up again: no bubble where F, B and W last alike, in 1F1B's memory.

    The pattern is that of at least 2·stages − 1 microbatches, without those there are not.

    Source: Qi et al. 2023, arXiv:2401.10241, section 6.
    """
    full, ahead = max(micros, 2 * stages - 1), stages - stage
    phases = (  # how often, what; 0 is the chunk on the way down, 1 the one on the way up
        (2 * ahead - 1, "F0"),
        (stage, "F1 F0"),
        (ahead, "F1 B1 W1"),
        (full - stages - ahead + 1, "F0 B0 W0 F1 B1 W1"),
        (ahead - 1, "B0 W0 F1 B1 W1"),
        (stage, "B0 B1"),
        (ahead, "B0 W0"),
        (stage, "W1"),
        (stage, "W0"),
    )
    chunks = (stage, 2 * stages - 1 - stage)
    count: dict[str, int] = defaultdict(int)  # the next microbatch of "F0", "B1", …
    actions = []
    for name in chain.from_iterable(names.split() * times for times, names in phases):
        actions.append(Action(name[0], count[name], chunks[int(name[1])]))
        count[name] += 1
    return [action for action in actions if action.micro < micros]


def dealt(chunk: int, stages: int) -> int:
    """The stage of a chunk where chunks are dealt round: 0 1 2 0 1 2."""
    return chunk % stages


def folded(chunk: int, stages: int) -> int:
    """The stage of a chunk where chunks go down the stages and up again: 0 1 2 2 1 0."""
    return chunk if chunk < stages else 2 * stages - 1 - chunk


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What there is to know of a schedule besides its order."""

    order: Callable[..., list[Action]]  # (stage, stages, micros), and chunks_per_stage where that is free
    split: bool = False  # whether the weights' backward is an action of its own, W
    chunks_per_stage: int | None = 1  # None: free
    stage_of: Callable[[int, int], int] = dealt  # (chunk, stages) → stage


SCHEDULES = {
    "gpipe": Schedule(order=gpipe),
    "breadth_first": Schedule(order=breadth_first, chunks_per_stage=None),
    "1f1b": Schedule(order=one_f_one_b),
    "interleaved_1f1b": Schedule(order=interleaved_1f1b, chunks_per_stage=None),
    "zb_h1": Schedule(order=zb_h1, split=True),
    "zb_h2": Schedule(order=zb_h2, split=True),
    "zb_v": Schedule(order=zb_v, split=True, chunks_per_stage=2, stage_of=folded),
}


def orders(name: str, stages: int, micros: int, chunks_per_stage: int | None = None) -> list[list[Action]]:
    """The actions of every stage under the schedule `name`.

    chunks_per_stage  where the schedule leaves it free; elsewhere None or what the schedule has

    Errors     ValueError for a name that is not in SCHEDULES, a count below 1, chunks that the schedule does not have
    """
    if name not in SCHEDULES:
        raise ValueError(f"llmsys.parallel.orders: schedule {name!r}, expected one of {', '.join(SCHEDULES)}")
    if stages < 1 or micros < 1:
        raise ValueError(f"llmsys.parallel.orders: {stages} stages, {micros} microbatches, expected at least 1 of each")
    schedule = SCHEDULES[name]
    if schedule.chunks_per_stage is not None:
        if chunks_per_stage not in (None, schedule.chunks_per_stage):
            raise ValueError(
                f"llmsys.parallel.orders: {chunks_per_stage} chunks per stage for {name}, "
                f"expected {schedule.chunks_per_stage}"
            )
        return [schedule.order(stage, stages, micros) for stage in range(stages)]
    if chunks_per_stage is None or chunks_per_stage < 1:
        raise ValueError(f"llmsys.parallel.orders: chunks_per_stage={chunks_per_stage} for {name}, expected at least 1")
    return [schedule.order(stage, stages, micros, chunks_per_stage) for stage in range(stages)]
