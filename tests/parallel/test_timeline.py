"""When each action starts and ends."""

import pytest

from llmsys.parallel.schedule import Action, orders
from llmsys.parallel.timeline import Costs, timeline


def test_by_hand():
    """Two stages, two microbatches: F 1 s, B 2 s, W 4 s, a hop 0.5 s."""
    costs = Costs(forward_s=1, backward_s=2, weight_s=4, hop_s=0.5)
    whole = timeline(orders("gpipe", 2, 2), costs)
    assert whole.start_s == ((0, 1, 10, 16), (1.5, 2.5, 3.5, 9.5))
    assert whole.end_s[0][-1] == whole.total_s == 22
    assert whole.span_s == (22, 14)
    assert whole.busy_s == (14, 14)
    assert whole.bubble_rate == pytest.approx(8 / 22)


def test_split_backward_passes_the_gradient_on_before_the_weights():
    costs = Costs(forward_s=1, backward_s=2, weight_s=4)
    times = timeline(orders("zb_h1", 2, 1), costs)
    assert times.start_s == ((0, 4, 6), (1, 2, 4))  # F B W on stage 1: stage 0's B starts as its B ends, at 4
    assert timeline(orders("1f1b", 2, 1), costs).start_s == ((0, 8), (1, 2))


def test_costs_of_each_chunk():
    costs = Costs(forward_s=[1, 2], backward_s=[3, 4], weight_s=0)
    times = timeline(orders("gpipe", 2, 1), costs)
    assert times.start_s == ((0, 7), (1, 3))
    assert times.busy_s == (4, 6)


def test_a_hop_is_between_stages_alone():
    costs = Costs(forward_s=1, backward_s=1, weight_s=1, hop_s=100)
    assert timeline(orders("zb_v", 1, 3), costs).bubble_rate == 0


def test_errors():
    costs = Costs(forward_s=[1, 2, 3], backward_s=1, weight_s=1)
    with pytest.raises(
        ValueError, match=r"^llmsys\.parallel\.timeline: 3 costs in forward_s, expected 2, one for each"
    ):
        timeline(orders("1f1b", 2, 2), costs)
    with pytest.raises(ValueError, match=r"^llmsys\.parallel\.timeline: stage 1 has no actions"):
        timeline([[Action("F", 0, 0)], []], costs)
    with pytest.raises(ValueError, match="deadlock: .* for B0 of chunk 1, which no stage has"):
        timeline(
            [[Action("F", 0, 0), Action("B", 0, 0)], [Action("F", 0, 1)]], Costs(forward_s=1, backward_s=1, weight_s=1)
        )
