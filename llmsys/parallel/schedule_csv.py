"""Schedules in files: the compute-only CSV of torch.distributed.pipelining, so that either can run the other's.

One row a stage, one cell an action: chunk, kind, microbatch, as 2F0. Kinds are F, B for the whole backward, I for the
backward of the input and W for that of the weights. Source: PyTorch 2.13, torch/distributed/pipelining/schedules.py,
_Action and PipelineScheduleMulti._load_csv.
"""

import csv
import re
from pathlib import Path

from llmsys.parallel.schedule import Action, Actions

CELL = re.compile(r"(\d+)([FBIW])(\d+)")


def write_csv(actions: Actions, path: str | Path) -> None:
    """Write the actions of all stages."""
    split = any(action.kind == "W" for row in actions for action in row)
    with open(path, "w", newline="") as file:
        for row in actions:
            csv.writer(file).writerow(
                f"{chunk}{'I' if split and kind == 'B' else kind}{micro}" for kind, micro, chunk in row
            )


def read_csv(path: str | Path) -> list[list[Action]]:
    """The actions of all stages. Empty cells, which PyTorch writes where a stage idles, are left out.

    Where a file has whole backwards beside split ones, they are B and, at once, W.

    Errors   ValueError for a cell that is not an action, naming row and column; verify the rest
    """
    with open(path, newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    cells: list[list[tuple[str, int, int]]] = [[] for _ in rows]
    for stage, row in enumerate(rows):
        for column, cell in enumerate(row):
            found = CELL.fullmatch(cell)
            if found:
                cells[stage].append((found[2], int(found[3]), int(found[1])))
            elif cell:
                raise ValueError(
                    f"llmsys.parallel.read_csv: {cell!r} in row {stage}, column {column} of {path}, expected an action "
                    "like 2F0: chunk, one of F, B, I, W, microbatch"
                )
    split = any(kind in "IW" for row in cells for kind, _, _ in row)
    names = {"F": "F", "B": "BW" if split else "B", "I": "B", "W": "W"}
    return [[Action(name, micro, chunk) for kind, micro, chunk in row for name in names[kind]] for row in cells]
