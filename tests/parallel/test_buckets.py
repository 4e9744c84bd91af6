"""The layout of flat buckets."""

import itertools
import random

import pytest

from llmsys.parallel.buckets import buckets_of


@pytest.mark.parametrize(
    "capacity, parts, seed", list(itertools.product((1, 7, 50, 1000, None), (1, 2, 3, 8), range(5)))
)
def test_every_parameter_once_and_in_turn(capacity, parts, seed):
    draw = random.Random(seed)
    parameters = [
        (f"p{i}", tuple(draw.randint(1, 6) for _ in range(draw.randint(0, 3))), draw.choice(["decay", "none"]))
        for i in range(draw.randint(0, 20))
    ]
    buckets = buckets_of(parameters, capacity, parts)
    kinds = {name: kind for name, _, kind in parameters}
    for kind in set(kinds.values()):
        pieces = [piece for bucket in buckets if bucket.kind == kind for piece in bucket.pieces]
        assert [piece.name for piece in pieces] == [name for name in reversed(kinds) if kinds[name] == kind]
    assert capacity is not None or len(buckets) == len(set(kinds.values()))
    shapes = {name: shape for name, shape, _ in parameters}
    for bucket in buckets:
        end = 0
        for piece in bucket.pieces:
            assert piece.start == end and piece.shape == shapes[piece.name] and kinds[piece.name] == bucket.kind
            end = piece.end
        assert bucket.numel == end <= bucket.size < end + parts and bucket.size % parts == 0
        assert capacity is None or end <= capacity or len(bucket.pieces) == 1


def test_the_first_found_is_small():
    """An eighth, that ranks begin to talk early; each kind has one."""
    buckets = buckets_of([(f"p{i}", (4,), "a" if i % 9 else "b") for i in range(60)], 64, 1)
    assert [bucket.numel for bucket in buckets if bucket.kind == "a"] == [8, 64, 64, 64, 12]
    assert [bucket.numel for bucket in buckets if bucket.kind == "b"] == [8, 20]


def test_padding_is_less_than_a_rank():
    (bucket,) = buckets_of([("a", (3, 3), 0), ("b", (), 0)], 100, 4)
    assert [(piece.name, piece.start) for piece in bucket.pieces] == [("b", 0), ("a", 1)] and bucket.size == 12


@pytest.mark.parametrize("capacity, parts", [(0, 2), (5, 0)])
def test_errors(capacity, parts):
    with pytest.raises(ValueError, match=f"capacity={capacity} and parts={parts}, expected 1 or more"):
        buckets_of([], capacity, parts)
