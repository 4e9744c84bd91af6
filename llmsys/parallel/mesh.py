"""Which rank does what: a job's ranks along named axes. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

# Outermost first. Neighbours along the last one are neighbours in rank: on one host, where it is fastest.
AXES = ("pp", "replicate", "shard", "cp", "ep", "tp")
MEANINGS = {
    "pp": "pipeline stages",
    "replicate": "replicas of a sharded model (HSDP)",
    "shard": "data parallel ranks that ZeRO shards over",
    "cp": "parts of a sequence",
    "ep": "experts",
    "tp": "parts of each weight",
}
COMBINED = {
    "dp": ("replicate", "shard"),
    "data": ("replicate", "shard", "cp", "ep"),
    "copies": ("replicate", "cp", "ep"),
    "model": ("pp", "tp"),
    "world": AXES,
}


@dataclass(frozen=True)
class Axis:
    """One line of ranks through the mesh: the ranks that differ in this axis alone from the rank it belongs to."""

    name: str
    ranks: tuple[int, ...]  # of the job, in order
    rank: int  # this one's place among them
    channel: str = ""  # one that is not "" has a group of its own

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __str__(self) -> str:
        return f"{self.name} (ranks {', '.join(map(str, self.ranks))})"


class Mesh:
    """`rank` among the ranks of a job of pp · dp · cp · ep · tp of them.

    `mesh.tp`, `mesh.pp`, … are axes: `mesh.tp.rank` of `mesh.tp.size`. `mesh.dp` is made of `mesh.replicate` and
    `mesh.shard`, of `shard` ranks, all of dp by default: ZeRO shards over the latter (HSDP). Every rank of dp, cp and
    ep computes the gradient of other tokens: together they are `mesh.data`, and without shard `mesh.copies`, which hold
    the same shards. The ranks of pp and tp hold a model together, `mesh.model`. `mesh.world` is all ranks.

    Errors     ValueError if a size is below 1, shard does not divide dp, or the rank is not of the job
    """

    replicate: Axis
    shard: Axis
    dp: Axis
    data: Axis
    copies: Axis
    model: Axis
    world: Axis
    pp: Axis
    cp: Axis
    ep: Axis
    tp: Axis

    def __init__(
        self,
        *,
        pp: int = 1,
        dp: int = 1,
        cp: int = 1,
        ep: int = 1,
        tp: int = 1,
        shard: int | None = None,
        rank: int = 0,
    ):
        given = {"pp": pp, "dp": dp, "cp": cp, "ep": ep, "tp": tp}
        for name, size in given.items():
            if size < 1:
                raise ValueError(f"llmsys.parallel.Mesh: {name}={size}, expected 1 or more")
        shard = dp if shard is None else shard
        if shard < 1 or dp % shard:
            raise ValueError(f"llmsys.parallel.Mesh: shard={shard} with dp={dp}, expected a divisor of dp")
        self.sizes = dict(zip(AXES, (pp, dp // shard, shard, cp, ep, tp), strict=True))
        self.rank = rank
        if not 0 <= rank < self.size:
            shape = " · ".join(f"{name} {size}" for name, size in given.items())
            raise ValueError(f"llmsys.parallel.Mesh: rank={rank}, expected one of the {self.size} ranks of {shape}")
        for name in AXES:
            setattr(self, name, self._line(name, (name,)))
        for name, parts in COMBINED.items():
            setattr(self, name, self._line(name, parts))

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return prod(self.sizes.values())

    def coordinate_of(self, rank: int) -> dict[str, int]:
        """Where a rank is on each of `AXES`."""
        found = {}
        for name in reversed(AXES):
            rank, found[name] = divmod(rank, self.sizes[name])
        return {name: found[name] for name in AXES}

    def rank_at(self, **coordinate: int) -> int:
        """The rank at a coordinate; on the axes that are not given, where this one is."""
        unknown = set(coordinate) - set(AXES)
        if unknown:
            raise ValueError(f"llmsys.parallel.Mesh: axis {min(unknown)}, expected one of {', '.join(AXES)}")
        rank = 0
        for name, place in (self.coordinate | coordinate).items():
            if not 0 <= place < self.sizes[name]:
                raise ValueError(
                    f"llmsys.parallel.Mesh: {name}={place}, expected a place from 0 to {self.sizes[name] - 1}"
                )
            rank = rank * self.sizes[name] + place
        return rank

    @cached_property
    def coordinate(self) -> dict[str, int]:
        """Where this rank is on each of `AXES`."""
        return self.coordinate_of(self.rank)

    def _line(self, name: str, parts: tuple[str, ...]) -> Axis:
        places = product(*(range(self.sizes[part]) for part in parts))
        ranks = tuple(self.rank_at(**dict(zip(parts, place, strict=True))) for place in places)
        return Axis(name, ranks, ranks.index(self.rank))

    def __str__(self) -> str:
        """A map: which axes there are, and a line for each rank."""
        used = [name for name in AXES if self.sizes[name] > 1]
        lines = [f"{self.size} ranks"]
        lines += [f"  {name} {self.sizes[name]}: {MEANINGS[name]}" for name in used]
        for rank in range(self.size):
            coordinate = self.coordinate_of(rank)
            lines.append(f"  rank {rank}: " + (" ".join(f"{name} {coordinate[name]}" for name in used) or "everything"))
        return "\n".join(lines)
