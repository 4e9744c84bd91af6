"""Which part of a weight a rank of tensor parallelism holds. Pure arithmetic, and the part of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsys.parallel.mesh import Axis


class Slice(NamedTuple):
    """[start, start + length) of a dimension, which `copies` ranks hold."""

    start: int
    length: int
    copies: int = 1


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a weight: slices, one after another, of dimension `dim`, whose size there is `whole`."""

    dim: int
    whole: int
    slices: tuple[Slice, ...]

    def of(self, x: Any) -> Tensor:
        """That part of the whole `x`: of a tensor, or of what is indexed like one, as a weight in a file is."""
        return torch.cat(self.slices_of(x), self.dim) if len(self.slices) > 1 else self.slices_of(x)[0]

    def slices_of(self, x: Any) -> list[Tensor]:
        """As views, where x is a tensor."""
        before = (slice(None),) * self.dim
        places = [(*before, slice(start, start + length)) for start, length, _ in self.slices]
        return [x[place] for place in places]

    def whole_shape(self, part: torch.Size) -> tuple[int, ...]:
        """Of the weight that `part` is the shape of this part of."""
        return (*part[: self.dim], self.whole, *part[self.dim + 1 :])


def shard_of(name: str, style: str, module: Any, unit: int, parameter: Tensor, axis: Axis) -> Shard | None:
    """None for what stays whole: the bias of a row, and a module whose output is cut."""
    if style == "sequence" or (style == "row" and parameter.dim() == 1):
        return None
    dim = 1 if style == "row" else 0
    whole = parameter.shape[dim]
    sizes = getattr(module, "sizes", (whole,)) if style in ("column", "heads") else (whole,)
    noun = "heads" if unit > 1 else {"row": "inputs", "vocab": "tokens"}.get(style, "outputs")
    slices, start = [], 0
    for index, size in enumerate(sizes):
        slice_ = _slice(start, size, unit, style == "heads", axis)
        if slice_ is None:
            which = f"part {index} of sizes {sizes}" if len(sizes) > 1 else f"of shape {tuple(parameter.shape)}"
            raise ValueError(
                f"llmsys.parallel.tensor: {name} {which} has {size // unit} {noun}, expected a multiple of the "
                f"{axis.size} ranks of {axis}"
            )
        slices.append(slice_)
        start += size
    return Shard(dim, whole, tuple(slices))


def _slice(start: int, size: int, unit: int, copied: bool, axis: Axis) -> Slice | None:
    """This rank's part of [start, start + size), whole units of it; None if there are no equal parts."""
    units = size // unit
    if size % unit or not units:
        return None
    if copied and axis.size % units == 0:
        copies = axis.size // units
        return Slice(start + axis.rank // copies * unit, unit, copies)
    length = units // axis.size * unit
    return None if units % axis.size else Slice(start + axis.rank * length, length)
