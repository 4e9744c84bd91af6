"""What `accelerate` did to a model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One module: its kind, where it is, the name of its class, and the op it runs on or why it was left."""

    kind: str
    path: str
    module: str
    what: str


@dataclass(frozen=True)
class Report:
    """The modules that run on our kernels now, and those that look as if they could and do not, with the reason."""

    model: str
    swapped: tuple[Line, ...]
    left: tuple[Line, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} modules swapped, {len(self.left)} left"]
        for lines_of, sign in ((self.swapped, "→"), (self.left, "left:")):
            # Layers that differ by their number only are one line.
            groups = Counter(
                (line.kind, re.sub(r"\b\d+\b", "*", line.path), line.module, line.what) for line in lines_of
            )
            for (kind, path, module, what), count in groups.items():
                lines.append(f"  {kind:<9} {count:>4} × {path or '(the model)'} ({module}) {sign} {what}")
        if not self.swapped and not self.left:
            lines.append(
                "  nothing in it looks like a norm, an MLP, a rotary embedding, an attention or a loss that we know"
            )
        return "\n".join(lines)
