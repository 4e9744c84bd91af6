"""The verifier lets nothing wrong pass, and says where it is."""

import pytest
from hypothesis import assume, given, strategies as st

from llmsys.parallel.schedule import SCHEDULES, Action, orders
from llmsys.parallel.timeline import Costs
from llmsys.parallel.verify import Channel, verify

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
drawn = {"stages": st.integers(1, 5), "micros": st.integers(1, 9), "free": st.integers(1, 3), "data": st.data()}


def drawn_orders(name, stages, micros, free):
    """Orders, and what `verify` is told of them."""
    v = SCHEDULES[name].chunks_per_stage or free
    facts = {"micros": micros, "chunks": stages * v, "split": SCHEDULES[name].split}
    return orders(name, stages, micros, v), facts


def one_place(data, actions):
    stage = data.draw(st.integers(0, len(actions) - 1))
    return stage, data.draw(st.integers(0, len(actions[stage]) - 1))


@each_schedule
@given(**drawn)
def test_a_dropped_action(name, stages, micros, free, data):
    actions, facts = drawn_orders(name, stages, micros, free)
    stage, index = one_place(data, actions)
    gone = actions[stage].pop(index)
    where = rf"stage {stage}, which has .* at \d+, has no {gone}" if actions[stage] else rf"no stage has {gone}"
    if not any(action.chunk == gone.chunk for row in actions for action in row):
        where = rf"no stage has {gone}"
    with pytest.raises(ValueError, match=rf"^llmsys\.parallel\.verify: {where}, expected"):
        verify(actions, **facts)


@each_schedule
@given(**drawn)
def test_a_doubled_action(name, stages, micros, free, data):
    actions, facts = drawn_orders(name, stages, micros, free)
    stage, index = one_place(data, actions)
    twice = actions[stage][index]
    other = data.draw(st.integers(0, stages - 1))
    actions[other].append(twice)
    with pytest.raises(ValueError, match=rf"stage \d+ has {twice} at \d+ and stage \d+ at \d+, expected once"):
        verify(actions, **facts)


@each_schedule
@given(**drawn)
def test_swapped_actions(name, stages, micros, free, data):
    """Two actions of one microbatch and chunk out of order never end; the message says who waits for what."""
    actions, facts = drawn_orders(name, stages, micros, free)
    stage, index = one_place(data, actions)
    row, first = actions[stage], actions[stage][index]
    later = [i for i in range(index + 1, len(row)) if row[i][1:] == first[1:]]
    assume(later)
    row[index], row[later[0]] = row[later[0]], row[index]
    with pytest.raises(ValueError, match=r"^llmsys\.parallel\.walk: deadlock: stage \d+ waits at \d+ \(.*\) for"):
        verify(actions, **facts)


@each_schedule
@given(**drawn)
def test_any_swap_is_a_deadlock_or_harmless(name, stages, micros, free, data):
    """Against a slow executor that knows nothing of ours: repeat passes over the stages until nothing moves."""
    actions, facts = drawn_orders(name, stages, micros, free)
    stage, index = one_place(data, actions)
    row, other = actions[stage], data.draw(st.integers(0, len(actions[stage]) - 1))
    row[index], row[other] = row[other], row[index]
    if ends(actions, facts["chunks"]):
        verify(actions, **facts)
    else:
        with pytest.raises(ValueError, match="deadlock"):
            verify(actions, **facts)


def ends(actions, chunks):
    left, done, moved = [list(row) for row in actions], set(), True
    while moved:
        moved = False
        for row in left:
            if row and able(row[0], done, chunks):
                done.add(row.pop(0))
                moved = True
    return not any(left)


def able(action, done, chunks):
    kind, micro, chunk = action
    if kind == "F":
        return chunk == 0 or ("F", micro, chunk - 1) in done
    if kind == "W":
        return ("B", micro, chunk) in done
    return ("F", micro, chunk) in done and (chunk == chunks - 1 or ("B", micro, chunk + 1) in done)


def test_a_deadlock_is_told_as_a_cycle():
    actions = [[Action("F", 0, 0), Action("B", 0, 0), Action("F", 1, 0), Action("B", 1, 0)]]
    actions.append([Action("F", 0, 1), Action("F", 1, 1), Action("B", 0, 1), Action("B", 1, 1)])
    with pytest.raises(ValueError) as error:
        verify(actions, micros=2, chunks=2, split=False)
    assert str(error.value) == (
        "llmsys.parallel.walk: deadlock: stage 0 waits at 1 (B0 of chunk 0) for B0 of chunk 1, which stage 1 has at 2; "
        "stage 1 waits at 1 (F1 of chunk 1) for F1 of chunk 0, which stage 0 has at 2, expected an order that ends"
    )


def test_a_chunk_on_two_stages():
    actions = orders("1f1b", 2, 2)
    actions[1].append(actions[0].pop())
    with pytest.raises(
        ValueError, match="stage 1 has B1 of chunk 0 at 4 and stage 0 F0 of that chunk, expected all of"
    ):
        verify(actions, micros=2, chunks=2, split=False)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"micros": 1, "chunks": 2, "split": False}, "stage 0 has F1 of chunk 0 at 1, expected kinds F, B of 1 micro"),
        ({"micros": 2, "chunks": 1, "split": False}, "stage 1 has F0 of chunk 1 at 0, expected .* and 1 chunks"),
        ({"micros": 2, "chunks": 3, "split": False}, "no stage has B0 of chunk 2, expected every action once"),
        ({"micros": 3, "chunks": 2, "split": False}, "stage 0, which has F1 of chunk 0 at 1, has no B2 of chunk 0"),
        ({"micros": 2, "chunks": 2, "split": True}, "stage 0, which has F0 of chunk 0 at 0, has no W0 of chunk 0"),
        ({"micros": 0, "chunks": 2, "split": True}, "0 microbatches and 2 chunks, expected at least 1 of each"),
    ],
)
def test_facts_that_are_not_so(facts, message):
    with pytest.raises(ValueError, match=message):
        verify(orders("1f1b", 2, 2), **facts)


def test_a_split_that_was_not_said():
    with pytest.raises(ValueError, match=r"stage 0 has W0 of chunk 0 at 3, expected kinds F, B of"):
        verify(orders("zb_h1", 2, 2), micros=2, chunks=2, split=False)


def test_what_is_held_at_each_moment():
    report = verify(orders("1f1b", 2, 3), micros=3, chunks=2, split=False)
    assert report.live == ((1, 2, 2, 2, 2, 1), (1, 1, 1, 1, 1, 1))  # F0 F1 B0 F2 B1 B2; F0 B0 F1 B1 F2 B2
    report = verify(orders("zb_h1", 2, 2), micros=2, chunks=2, split=True)
    assert report.live == ((1, 2, 2, 2, 1, 1), (1, 1, 2, 2, 2, 1))  # F0 F1 B0 W0 B1 W1; F0 B0 F1 B1 W0 W1


def test_messages():
    actions = orders("1f1b", 2, 3)
    report = verify(actions, micros=3, chunks=2, split=False)
    assert report.messages.keys() == {Channel("F", 0, 1), Channel("B", 1, 0)}
    assert report.messages[Channel("F", 0, 1)].sent == tuple(Action("F", micro, 0) for micro in range(3))
    assert report.messages[Channel("B", 1, 0)].received == tuple(Action("B", micro, 1) for micro in range(3))


def test_messages_that_need_a_tag():
    """GPipe with the last stage's forwards in another order ends, but its messages come in the wrong one."""
    actions = orders("gpipe", 2, 2)
    actions[1][:2] = actions[1][1::-1]
    messages = verify(actions, micros=2, chunks=2, split=False).messages
    assert not messages[Channel("F", 0, 1)].in_order
    assert messages[Channel("B", 1, 0)].in_order


def test_bubbles_where_times_are_given():
    costs = Costs(forward_s=1, backward_s=1, weight_s=1)
    assert verify(orders("1f1b", 2, 3), micros=3, chunks=2, split=False).timeline is None
    times = verify(orders("1f1b", 2, 3), micros=3, chunks=2, split=False, costs=costs).timeline
    assert times.bubble_rate == pytest.approx(1 / 4)
