"""Proof that a pipeline's actions end, each done once, and what they hold and send on the way."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmsys.parallel.dependencies import needs, walk
from llmsys.parallel.schedule import Action, Actions
from llmsys.parallel.timeline import Costs, Timeline, timeline


class Channel(NamedTuple):
    """One way of messages: activations that F makes, or gradients that B makes.

    The two travel apart: in a V both go both ways between two stages, and in their common order one would overtake the
    other.
    """

    kind: str  # "F" or "B", of the actions that make the messages
    sender: int
    receiver: int


@dataclass(frozen=True)
class Messages:
    """What goes through a channel, each message named by the action that makes it."""

    sent: tuple[Action, ...]  # as the sender makes them
    received: tuple[Action, ...]  # as the receiver needs them

    @property
    def in_order(self) -> bool:
        """Whether a receiver that takes the next message each time takes the right one; else each must be tagged."""
        return self.sent == self.received


@dataclass(frozen=True)
class Report:
    """What `verify` found out of actions that are right."""

    stage_of: tuple[int, ...]  # the stage of each chunk
    live: tuple[tuple[int, ...], ...]  # by stage and index: (micro, chunk)s whose activations are held meanwhile
    messages: dict[Channel, Messages]
    timeline: Timeline | None  # where costs were given

    @property
    def peak_live(self) -> tuple[int, ...]:
        """The most activations each stage holds at once, in chunks of one microbatch."""
        return tuple(max(row, default=0) for row in self.live)


def verify(actions: Actions, *, micros: int, chunks: int, split: bool, costs: Costs | None = None) -> Report:
    """Execute the stages' lists by what each action needs.

    micros, chunks   how many there must be; each chunk's actions are all on one stage
    split            whether W is an action of its own; activations are held until it, else until B

    Errors     ValueError, naming stage and index, for an action that is missing, doubled or unknown, a chunk on two
               stages, and for a deadlock
    """
    if micros < 1 or chunks < 1:
        raise ValueError(
            f"llmsys.parallel.verify: {micros} microbatches and {chunks} chunks, expected at least 1 of each"
        )
    place = _places(actions, micros, chunks, split)
    stage_of = tuple(place[Action("F", 0, chunk)][0] for chunk in range(chunks))
    for action, (stage, index) in place.items():
        if stage != stage_of[action.chunk]:
            raise ValueError(
                f"llmsys.parallel.verify: stage {stage} has {action} at {index} and stage {stage_of[action.chunk]} "
                f"F0 of that chunk, expected all of a chunk on one stage"
            )
    for _ in walk(actions):
        pass
    return Report(
        stage_of,
        tuple(_live(row, "W" if split else "B") for row in actions),
        _messages(actions, stage_of),
        timeline(actions, costs) if costs else None,
    )


def _places(actions: Actions, micros: int, chunks: int, split: bool) -> dict[Action, tuple[int, int]]:
    """Stage and index of each action, which must be those expected."""
    kinds = "FBW" if split else "FB"
    expected = {Action(kind, micro, chunk) for chunk in range(chunks) for micro in range(micros) for kind in kinds}
    place: dict[Action, tuple[int, int]] = {}
    for stage, row in enumerate(actions):
        for index, action in enumerate(row):
            if action not in expected:
                raise ValueError(
                    f"llmsys.parallel.verify: stage {stage} has {action} at {index}, expected kinds {', '.join(kinds)} "
                    f"of {micros} microbatches and {chunks} chunks"
                )
            if action in place:
                raise ValueError(
                    f"llmsys.parallel.verify: stage {stage} has {action} at {index} and stage {place[action][0]} "
                    f"at {place[action][1]}, expected once"
                )
            place[action] = (stage, index)
    if missing := sorted(expected - place.keys()):
        raise ValueError(f"llmsys.parallel.verify: {_absence(missing[0], place)}, expected every action once")
    return place


def _absence(missing: Action, place: dict[Action, tuple[int, int]]) -> str:
    """Which stage lacks the action, and where it has what is nearest to it."""
    same = [action for action in place if action.chunk == missing.chunk]
    if not same:
        return f"no stage has {missing}"
    nearest = min(same, key=lambda action: abs(action.micro - missing.micro))
    stage, index = place[nearest]
    return f"stage {stage}, which has {nearest} at {index}, has no {missing}"


def _live(row: Sequence[Action], last: str) -> tuple[int, ...]:
    """Activations held while each action runs: from their F to the end of the action of kind `last`."""
    held, live = 0, []
    for action in row:
        held += action.kind == "F"
        live.append(held)
        held -= action.kind == last
    return tuple(live)


def _messages(actions: Actions, stage_of: tuple[int, ...]) -> dict[Channel, Messages]:
    """What each stage makes for another, and needs of it, in its own order."""
    sent, received = defaultdict(list), defaultdict(list)
    for stage, row in enumerate(actions):
        for action in row:
            for need in needs(action, len(stage_of)):
                if stage_of[need.chunk] != stage:
                    received[Channel(need.kind, stage_of[need.chunk], stage)].append(need)
            after = action.chunk + {"F": 1, "B": -1, "W": 0}[action.kind]
            if 0 <= after < len(stage_of) and stage_of[after] != stage:
                sent[Channel(action.kind, stage, stage_of[after])].append(action)
    return {channel: Messages(tuple(sent[channel]), tuple(received[channel])) for channel in sorted(sent)}
