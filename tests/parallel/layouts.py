"""Which layouts there are, and few of them in which every two choices, or every three, are together. Pure.

A new value is one word in `DIMENSIONS`; a new option of `parallelize` one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from math import prod
from typing import Any

from llmsys.parallel.schedule import SCHEDULES

Layout = dict[str, Any]
Dimensions = Mapping[str, Sequence[Any]]

ROWS = 16  # of a batch, which ranks and microbatches share
MAX_RANKS = 8
MESH = ("pp", "replicate", "shard", "tp")
DIMENSIONS: Dimensions = {
    "model": ("llama", "llama-untied", "gpt2"),  # of `composition.MODELS`
    "meta": (False, True),  # whether it is built without memory
    "pp": (1, 2, 4),
    "replicate": (1, 2),
    "shard": (1, 2, 4),
    "tp": (1, 2, 4),
    "micros": (1, 2, 8),
    "schedule": tuple(SCHEDULES),
    "sequence_parallel": (False, True),
    "overlap_chunks": (1, 2),
    "recompute": ("none", "selective", "full"),
    "zero": (0, 1, 2, 3),
}
OPTIONS = ("schedule", "sequence_parallel", "overlap_chunks", "recompute", "zero")  # of `parallelize`
# Stages, shards, parts of weights and parts of sequences at once.
ALL_AXES: Dimensions = {
    **DIMENSIONS,
    "pp": (2,),
    "replicate": (1,),
    "shard": (2,),
    "tp": (2,),
    "sequence_parallel": (True,),
    "zero": (1, 2, 3),
}
BOUND = (*MESH, "micros", "sequence_parallel", "overlap_chunks")  # what `possible` asks for; the rest is free


def layout_of(**choices: Any) -> Layout:
    """These, and of the rest what each dimension begins with: one process."""
    return {name: values[0] for name, values in DIMENSIONS.items()} | choices


def size_of(layout: Layout) -> int:
    """How many ranks it has."""
    return prod(layout[name] for name in MESH)


def possible(layout: Layout) -> bool:
    data = layout["replicate"] * layout["shard"]
    return (
        2 <= size_of(layout) <= MAX_RANKS
        and ROWS % (data * layout["micros"]) == 0
        and (layout["tp"] > 1 or not (layout["sequence_parallel"] or layout["overlap_chunks"] > 1))
    )


def frames(dimensions: Dimensions) -> list[Layout]:
    """All that a layout may be in the dimensions that are `BOUND`; those of little work first."""
    layouts = (dict(zip(BOUND, values, strict=True)) for values in product(*(dimensions[name] for name in BOUND)))
    return sorted(filter(possible, layouts), key=lambda layout: size_of(layout) * layout["micros"])


def everything(dimensions: Dimensions) -> Iterator[Layout]:
    """All layouts: each frame with any values of the other dimensions."""
    free = [name for name in dimensions if name not in BOUND]
    for frame in frames(dimensions):
        for values in product(*(dimensions[name] for name in free)):
            yield frame | dict(zip(free, values, strict=True))


def covering(dimensions: Dimensions, strength: int) -> list[Layout]:
    """Few layouts: any `strength` values that are together in some layout are so in one of these.

    Each takes up a combination that is missing, and chooses what else it has so that most others that are missing
    come with it.
    """
    every = frames(dimensions)
    missing = dict.fromkeys(_together(dimensions, every, strength))

    def gain(layout: Layout) -> int:
        return sum(each in missing for each in combinations(_in_order(layout).items(), strength))

    chosen = []
    while missing:
        layout = dict(next(iter(missing)))
        fitting = (frame for frame in every if all(layout.get(name, frame[name]) == frame[name] for name in BOUND))
        layout |= max(fitting, key=lambda frame: gain(layout | frame))
        for name, values in dimensions.items():
            if name not in layout:
                layout[name] = max(values, key=lambda value: gain(layout | {name: value}))
        chosen.append(_in_order(layout))
        for each in combinations(chosen[-1].items(), strength):
            missing.pop(each, None)
    return chosen


def _together(dimensions: Dimensions, every: Sequence[Layout], strength: int) -> Iterator[tuple]:
    """Every combination of that many values that some layout has."""
    for names in combinations(DIMENSIONS, strength):
        framed = {tuple((name, frame[name]) for name in names if name in BOUND) for frame in every}
        free = [name for name in names if name not in BOUND]
        for bound, values in product(sorted(framed), product(*(dimensions[name] for name in free))):
            yield tuple(_in_order(dict([*bound, *zip(free, values, strict=True)])).items())


def _in_order(layout: Layout) -> Layout:
    return {name: layout[name] for name in DIMENSIONS if name in layout}


def name_of(layout: Layout) -> str:
    """`llama pp2 shard2 micros8 1f1b zero1 …`: what is more than one process, and every choice by name."""
    words = []
    for name, value in layout.items():
        if isinstance(value, str):
            words.append(f"recompute-{value}" if name == "recompute" else value)
        elif isinstance(value, bool):
            words += [name] * value
        elif value != 1 or name not in (*MESH, "overlap_chunks"):
            words.append(f"{name}{value}")
    return " ".join(words)
