"""Any layout trains as one process does: pipeline, tensor, sequence and data parallel, ZeRO."""

import pytest

from tests.parallel.composition import TOLERANCE, errors
from tests.parallel.layouts import ALL_AXES, DIMENSIONS, covering, layout_of, name_of
from tests.parallel.sweep import sweep

CASES = covering(DIMENSIONS, 2) + covering(ALL_AXES, 2)


@pytest.mark.parametrize("layout", CASES, ids=name_of)
def test_equals_one_process(layout):
    """Losses, norms, every gradient of every step, and the weights after three."""
    found = errors(layout)
    assert all(error <= TOLERANCE for error in found.values()), found


@pytest.mark.parametrize(
    "choices",
    [
        {"tp": 2, "sequence_parallel": True, "overlap_chunks": 2},
        {"tp": 4, "recompute": "selective"},
        {"pp": 2, "shard": 2, "zero": 1, "schedule": "zb_h1", "recompute": "full"},
        {"pp": 2, "tp": 2, "shard": 2, "zero": 3, "sequence_parallel": True, "recompute": "full", "overlap_chunks": 2},
    ],
    ids=str,
)
def test_dropout_is_that_of_one_process(choices):
    test_equals_one_process(layout_of(model="gpt2-dropout", micros=2, **choices))


@pytest.mark.sweep
def test_every_three_choices():
    wrong = [row for row in sweep(covering(DIMENSIONS, 3)) if not row["right"]]
    assert not wrong, "\n".join(f"{row['layout']}: {row['raised'] or row['errors']}" for row in wrong)
