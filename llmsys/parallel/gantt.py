"""A picture of a pipeline: one row a stage, one bar an action."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import env
from llmsys.parallel.schedule import Actions
from llmsys.parallel.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"F": "#6699cc", "B": "#66aa77", "W": "#ddaa55"}
NAMES = {"F": "forward", "B": "backward", "W": "weights' backward"}
NUMBERED = 64  # microbatches a stage: more leave no room for numbers


def gantt(actions: Actions, times: Timeline, title: str = "") -> Figure:
    """Draw the actions at their times; later chunks of a stage are darker. `gantt(…).savefig("schedule.svg")` keeps it.

    Errors   RuntimeError without matplotlib
    """
    if not env.has("matplotlib"):
        raise RuntimeError("llmsys.parallel.gantt: matplotlib is missing, expected it; pip install matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    micros = 1 + max(action.micro for row in actions for action in row)
    figure = Figure(figsize=(16, 1 + 0.45 * len(actions)), layout="constrained")
    axes = figure.subplots()
    for stage, row in enumerate(actions):
        chunks = sorted({action.chunk for action in row})
        start, end = times.start_s[stage], times.end_s[stage]
        axes.broken_barh(
            [(first, last - first) for first, last in zip(start, end, strict=True)],
            (stage - 0.45, 0.9),
            facecolors=[_shade(COLOURS[action.kind], chunks.index(action.chunk) / len(chunks)) for action in row],
            edgecolor="white",
            linewidth=0.5,
        )
        if micros <= NUMBERED:
            for action, first, last in zip(row, start, end, strict=True):
                axes.text((first + last) / 2, stage, str(action.micro), ha="center", va="center", fontsize=6)
    kinds = [kind for kind in COLOURS if any(action.kind == kind for row in actions for action in row)]
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    axes.set(
        xlabel="s", ylabel="stage", yticks=range(len(actions)), title=f"{title} {times.bubble_rate:.1%} idle".strip()
    )
    axes.invert_yaxis()
    return figure


def _shade(colour: str, darker: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(part * (1 - darker / 2) for part in to_rgb(colour))
