"""What each action of a pipeline needs, and stages that run their actions as soon as that is there."""

from collections import defaultdict, deque
from collections.abc import Iterator

from llmsys.parallel.schedule import Action, Actions


def needs(action: Action, chunks: int) -> Iterator[Action]:
    """What must be done before `action` can be: F of the chunk before; own F and B of the chunk after; own B."""
    kind, micro, chunk = action
    if kind == "F":
        if chunk > 0:
            yield Action("F", micro, chunk - 1)
    elif kind == "B":
        yield Action("F", micro, chunk)
        if chunk < chunks - 1:
            yield Action("B", micro, chunk + 1)
    else:
        yield Action("B", micro, chunk)


def walk(actions: Actions) -> Iterator[tuple[int, int, Action]]:
    """(stage, index, action) of every action, each after all that it needs; ValueError where stages wait for ever."""
    chunks = 1 + max((action.chunk for row in actions for action in row), default=-1)
    done: set[Action] = set()
    at = [0] * len(actions)
    waiting: dict[Action, list[int]] = defaultdict(list)
    ready = deque(range(len(actions)))
    while ready:
        stage = ready.popleft()
        for index in range(at[stage], len(actions[stage])):
            action = actions[stage][index]
            missing = next((need for need in needs(action, chunks) if need not in done), None)
            if missing is not None:
                waiting[missing].append(stage)
                break
            yield stage, index, action
            done.add(action)
            at[stage] += 1
            ready.extend(waiting.pop(action, ()))
    if waiting:
        raise ValueError(f"llmsys.parallel.walk: deadlock: {_cycle(actions, at, waiting)}, expected an order that ends")


def _cycle(actions: Actions, at: list[int], waiting: dict[Action, list[int]]) -> str:
    """Who waits for whom, from one stage that waits until one that was named, or until what no stage has."""
    place = {action: (stage, index) for stage, row in enumerate(actions) for index, action in enumerate(row)}
    awaited = {stage: action for action, stages in waiting.items() for stage in stages}
    stage, links = min(awaited), {}
    while stage not in links:
        need = awaited[stage]
        holder, index = place.get(need, (None, None))
        where = "which no stage has" if holder is None else f"which stage {holder} has at {index}"
        links[stage] = f"stage {stage} waits at {at[stage]} ({actions[stage][at[stage]]}) for {need}, {where}"
        if holder is None:
            break
        stage = holder
    return "; ".join(links.values())
