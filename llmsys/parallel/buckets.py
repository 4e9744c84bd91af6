"""How parameters lie one after another in flat buckets that ranks hold in equal parts. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import inf, prod


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


FIRST = 1 / 8  # of the capacity: what the bucket that a backward finds first has, so that ranks begin to talk early


def buckets_of(
    parameters: Iterable[tuple[str, tuple[int, ...], Hashable]], capacity: int | None, parts: int
) -> list[Bucket]:
    """Buckets of at most `capacity` elements, or of one parameter that is larger, each of a size that `parts` divides.
    Without a capacity, one of each kind.

    `parameters` are (name, shape, kind) in the order in which the model uses them. Backward finds gradients from the
    last one on: so do the buckets begin, and the first one of each kind is small. Only parameters of one kind share
    one: of a dtype, say, and of a group of the optimizer.
    Errors     ValueError if capacity or parts is below 1
    """
    if parts < 1 or (capacity is not None and capacity < 1):
        raise ValueError(
            f"llmsys.parallel.buckets: capacity={capacity} and parts={parts}, expected 1 or more elements and parts"
        )
    largest = inf if capacity is None else capacity
    filling: dict[Hashable, list[Piece]] = {}
    buckets: list[Bucket] = []
    begun: set[Hashable] = set()  # kinds that have a bucket

    def close(kind: Hashable) -> None:
        pieces = filling.pop(kind)
        buckets.append(Bucket(kind, tuple(pieces), -(-pieces[-1].end // parts) * parts))
        begun.add(kind)

    for name, shape, kind in reversed(list(parameters)):
        room = largest if kind in begun else largest * FIRST
        if kind in filling and filling[kind][-1].end + prod(shape) > room:
            close(kind)
        pieces = filling.setdefault(kind, [])
        pieces.append(Piece(name, shape, pieces[-1].end if pieces else 0))
    for kind in list(filling):
        close(kind)
    return buckets
