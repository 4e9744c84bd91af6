"""The split whose largest part is least."""

from itertools import combinations

import pytest
from hypothesis import given, strategies as st

from llmsys.parallel.balance import balanced


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_no_split_is_better(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    runs = balanced(costs, stages)
    assert len(runs) == stages and all(runs)
    assert [block for run in runs for block in run] == list(range(len(costs)))
    best = min(largest(costs, (0, *cuts, len(costs))) for cuts in combinations(range(1, len(costs)), stages - 1))
    assert max(sum(costs[block] for block in run) for run in runs) == best


def largest(costs, bounds):
    return max(sum(costs[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True))


def test_a_heavy_head_leaves_its_stage_fewer_blocks():
    """An embedding that costs nothing, eight blocks, a head that costs three."""
    assert [len(run) for run in balanced([0, *[1] * 8, 3], 4)] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (([1, 2], 3), "2 blocks for 3 stages, expected 1 to 2"),
        (([1, 2], 0), "2 blocks for 0 stages, expected 1 to 2"),
        (([1, -2], 1), "cost -2 of block 1, expected at least 0"),
        (([1, float("nan")], 1), "cost nan of block 1, expected at least 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=rf"^llmsys\.parallel\.balanced: {message}"):
        balanced(*call)
