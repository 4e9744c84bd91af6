"""The arithmetic of ranks."""

import itertools

import pytest

from llmsys.parallel import Mesh
from llmsys.parallel.mesh import AXES

SIZES = [
    dict(zip(("pp", "dp", "cp", "ep", "tp"), sizes, strict=True)) for sizes in itertools.product((1, 2, 3), repeat=5)
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_axis_parts_the_ranks(sizes):
    """Each rank is on one line of each axis, which all of its ranks agree on."""
    size = Mesh(**sizes).size
    meshes = [Mesh(**sizes, rank=rank) for rank in range(size)]
    for name in (*AXES, "dp", "data", "world"):
        for rank, mesh in enumerate(meshes):
            axis = getattr(mesh, name)
            assert axis.ranks[axis.rank] == rank
            assert all(getattr(meshes[other], name).ranks == axis.ranks for other in axis.ranks)
            assert axis.ranks == tuple(sorted(axis.ranks))
    assert meshes[0].world.ranks == tuple(range(size))


def test_places():
    mesh = Mesh(pp=2, dp=4, tp=2, shard=2, rank=13)
    assert mesh.coordinate == {"pp": 1, "replicate": 1, "shard": 0, "cp": 0, "ep": 0, "tp": 1}
    assert mesh.tp.ranks == (12, 13) and mesh.tp.rank == 1
    assert mesh.shard.ranks == (13, 15) and mesh.replicate.ranks == (9, 13)
    assert mesh.dp.ranks == (9, 11, 13, 15) and mesh.dp.rank == 2
    assert mesh.pp.ranks == (5, 13)
    assert mesh.rank_at(pp=0) == 5 and mesh.rank_at(tp=0, shard=1) == 14
    assert [mesh.rank_at(**mesh.coordinate_of(rank)) for rank in range(16)] == list(range(16))


def test_map():
    assert str(Mesh(dp=2, tp=2, shard=1)).splitlines() == [
        *("4 ranks", "  replicate 2: replicas of a sharded model (HSDP)", "  tp 2: parts of each weight"),
        *("  rank 0: replicate 0 tp 0", "  rank 1: replicate 0 tp 1", "  rank 2: replicate 1 tp 0"),
        "  rank 3: replicate 1 tp 1",
    ]
    assert str(Mesh()) == "1 ranks\n  rank 0: everything"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"tp": 0}, r"tp=0, expected 1 or more"),
        ({"dp": 4, "shard": 3}, r"shard=3 with dp=4, expected a divisor of dp"),
        ({"dp": 2, "rank": 2}, r"rank=2, expected one of the 2 ranks of pp 1 · dp 2 · cp 1 · ep 1 · tp 1"),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        Mesh(**given)


def test_places_outside():
    with pytest.raises(ValueError, match="axis qp, expected one of pp, replicate, shard, cp, ep, tp"):
        Mesh().rank_at(qp=0)
    with pytest.raises(ValueError, match="tp=2, expected a place from 0 to 1"):
        Mesh(tp=2).rank_at(tp=2)
