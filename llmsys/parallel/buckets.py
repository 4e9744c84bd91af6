"""How parameters lie one after another in flat buckets that ranks hold in equal parts. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Piece:
    """A parameter's place in its bucket, in elements."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def end(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Bucket:
    """Parameters of one kind. `size` is that of the flat tensor: a multiple of the ranks, padded at its end."""

    kind: Hashable
    pieces: tuple[Piece, ...]
    size: int

    @property
    def numel(self) -> int:
        """Elements that are of parameters."""
        return self.pieces[-1].end


def buckets_of(parameters: Iterable[tuple[str, tuple[int, ...], Hashable]], capacity: int, parts: int) -> list[Bucket]:
    """Buckets of at most `capacity` elements, or of one parameter that is larger, each of a size that `parts` divides.

    `parameters` are (name, shape, kind) in the order in which the model uses them. Backward finds gradients from the
    last one on: so do the buckets begin. Only parameters of one kind share one: of a dtype, say, and of a group of
    the optimizer.
    Errors     ValueError if capacity or parts is below 1
    """
    if capacity < 1 or parts < 1:
        raise ValueError(
            f"llmsys.parallel.buckets: capacity={capacity} and parts={parts}, expected 1 or more elements and parts"
        )
    filling: dict[Hashable, list[Piece]] = {}
    buckets: list[Bucket] = []

    def close(kind: Hashable) -> None:
        pieces = filling.pop(kind)
        buckets.append(Bucket(kind, tuple(pieces), -(-pieces[-1].end // parts) * parts))

    for name, shape, kind in reversed(list(parameters)):
        if kind in filling and filling[kind][-1].end + prod(shape) > capacity:
            close(kind)
        pieces = filling.setdefault(kind, [])
        pieces.append(Piece(name, shape, pieces[-1].end if pieces else 0))
    for kind in list(filling):
        close(kind)
    return buckets
