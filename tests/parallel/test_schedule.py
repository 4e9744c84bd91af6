"""Each schedule is right, holds what its paper says it holds, and is idle as long as its paper says it is."""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import llmsys.parallel
from llmsys.parallel.schedule import SCHEDULES, Action, orders
from llmsys.parallel.timeline import Costs, timeline
from llmsys.parallel.verify import verify

# Name → the most activations that stage s of p holds, in chunks, with m microbatches and v chunks a stage, and the idle
# share where F, B and W of a chunk last alike and hops nothing. Both are for m a multiple of p and at least 2p.
TABLE = {
    "gpipe": (lambda s, p, m, v: m, lambda p, m, v: (p - 1) / (m + p - 1)),
    "breadth_first": (lambda s, p, m, v: v * m, lambda p, m, v: (p - 1) / (v * m + p - 1)),
    "1f1b": (lambda s, p, m, v: min(p - s, m), lambda p, m, v: (p - 1) / (m + p - 1)),
    "interleaved_1f1b": (
        lambda s, p, m, v: min((v - 1) * p + 2 * (p - s) - 1, v * m),
        lambda p, m, v: (p - 1) / (v * m + p - 1),
    ),
    "zb_h1": (lambda s, p, m, v: min(p, m), lambda p, m, v: (p - 1) / (3 * m + p - 1)),
    "zb_h2": (lambda s, p, m, v: min(2 * p - 1, m), lambda p, m, v: 0),
    "zb_v": (lambda s, p, m, v: 2 * p, lambda p, m, v: 0),
}
PUBLISHED = json.loads((Path(__file__).parent / "zero_bubble.json").read_text())["rows"]
INTERLEAVED_CHUNKS = {"1.5B": 3, "6.2B": 4, "14.6B": 3, "28.3B": 2}  # (layers + 2) / stages

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
counts = {"stages": st.integers(1, 9), "micros": st.integers(1, 30), "free": st.integers(1, 4)}


def chunks_of(name: str, free: int) -> int:
    return SCHEDULES[name].chunks_per_stage or free


def proven(name: str, stages: int, micros: int, v: int):
    return verify(orders(name, stages, micros, v), micros=micros, chunks=stages * v, split=SCHEDULES[name].split)


def idle(name: str, row: dict, v: int) -> float:
    """The bubble rate of a schedule with the published times of one of the paper's runs."""
    costs = Costs(
        forward_s=row["forward_ms"] / v,
        backward_s=row["backward_ms"] / v,
        weight_s=row["weight_ms"] / v,
        hop_s=row["comm_ms"],
    )
    return timeline(orders(name, row["stages"], row["micros"], v), costs).bubble_rate


def test_table_is_whole():
    assert TABLE.keys() == SCHEDULES.keys()


@each_schedule
@given(**counts)
def test_any_counts(name, stages, micros, free):
    """Any numbers of stages and microbatches end, hold no more than is there, and keep messages in order."""
    v = chunks_of(name, free)
    report = proven(name, stages, micros, v)
    assert report.stage_of == tuple(SCHEDULES[name].stage_of(chunk, stages) for chunk in range(stages * v))
    assert all(messages.in_order for messages in report.messages.values())
    assert max(report.peak_live) <= micros * v
    hops = sum(a != b for a, b in zip(report.stage_of, report.stage_of[1:], strict=False))
    assert sum(len(messages.sent) for messages in report.messages.values()) == 2 * micros * hops


@each_schedule
@given(stages=counts["stages"], rounds=st.integers(2, 4), free=counts["free"])
def test_what_is_held(name, stages, rounds, free):
    micros, v = stages * rounds, chunks_of(name, free)
    expected = tuple(TABLE[name][0](stage, stages, micros, v) for stage in range(stages))
    assert proven(name, stages, micros, v).peak_live == expected


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("interleaved_1f1b", "zb_v")])
@given(stages=counts["stages"], micros=counts["micros"])
def test_what_is_held_with_any_number_of_microbatches(name, stages, micros):
    expected = tuple(TABLE[name][0](stage, stages, micros, 1) for stage in range(stages))
    assert proven(name, stages, micros, 1).peak_live == expected


@given(stages=counts["stages"], micros=counts["micros"])
def test_a_v_holds_no_more_than_1f1b(stages, micros):
    assert max(proven("zb_v", stages, micros, 2).peak_live) <= min(2 * stages, 2 * micros)


@each_schedule
@given(stages=counts["stages"], rounds=st.integers(2, 4), free=counts["free"])
def test_idle_share_by_formula(name, stages, rounds, free):
    micros, v = stages * rounds, chunks_of(name, free)
    costs = Costs(forward_s=1, backward_s=1, weight_s=1)
    rate = timeline(orders(name, stages, micros, v), costs).bubble_rate
    assert rate == pytest.approx(TABLE[name][1](stages, micros, v), abs=1e-12)


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zb_h2"])
@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['model']}-{row['micros']}")
def test_published_idle_share(name, row):
    """Qi et al. 2023, table 5: as printed, to four decimals."""
    assert idle(name, row, 1) == pytest.approx(row[name], abs=0.5e-4)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['model']}-{row['micros']}")
def test_published_idle_share_interleaved(row):
    """The paper does not say what a hop costs here; with that of its table 9 we are up to 0.0035 above, never below."""
    above = idle("interleaved_1f1b", row, INTERLEAVED_CHUNKS[row["model"]]) - row["1f1b_interleaved"]
    assert 0 <= above <= 0.0036


def test_orders_spelt_out():
    assert spelt("gpipe", 2, 2) == ["F0 F1 B0 B1", "F0 F1 B0 B1"]
    assert spelt("1f1b", 2, 3) == ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]
    assert spelt("zb_h1", 2, 3) == ["F0 F1 B0 W0 F2 B1 W1 B2 W2", "F0 B0 F1 B1 W0 F2 B2 W1 W2"]
    assert spelt("zb_h2", 2, 3) == ["F0 F1 F2 B0 W0 B1 W1 B2 W2", "F0 B0 F1 B1 F2 B2 W0 W1 W2"]
    assert chunks("interleaved_1f1b", 2, 2, 2)[1] == "F0@1 F1@1 F0@3 B0@3 F1@3 B1@3 B0@1 B1@1"
    assert chunks("zb_v", 1, 2, 2)[0] == "F0@0 F0@1 B0@1 W0@1 F1@0 B0@0 W0@0 F1@1 B1@1 W1@1 B1@0 W1@0"


def spelt(name: str, stages: int, micros: int) -> list[str]:
    return [" ".join(f"{a.kind}{a.micro}" for a in row) for row in orders(name, stages, micros)]


def chunks(name: str, stages: int, micros: int, v: int) -> list[str]:
    return [" ".join(f"{a.kind}{a.micro}@{a.chunk}" for a in row) for row in orders(name, stages, micros, v)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("1f1", 2, 2), r"schedule '1f1', expected one of gpipe, .*1f1b"),
        (("1f1b", 0, 2), r"0 stages, 2 microbatches, expected at least 1 of each"),
        (("1f1b", 2, 0), r"2 stages, 0 microbatches, expected at least 1 of each"),
        (("1f1b", 2, 2, 2), r"2 chunks per stage for 1f1b, expected 1"),
        (("zb_v", 2, 2, 1), r"1 chunks per stage for zb_v, expected 2"),
        (("interleaved_1f1b", 2, 2), r"chunks_per_stage=None for interleaved_1f1b, expected at least 1"),
        (("interleaved_1f1b", 2, 2, 0), r"chunks_per_stage=0 for interleaved_1f1b, expected at least 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=rf"^llmsys\.parallel\.orders: {message}"):
        orders(*call)


def test_an_action_reads_as_it_is_spoken():
    assert str(Action("B", 3, 1)) == "B3 of chunk 1"


@pytest.mark.parametrize("name", ["schedule", "dependencies", "timeline", "verify", "balance", "schedule_csv", "gantt"])
def test_pure(name):
    """No torch in what a planner reads."""
    tree = ast.parse((Path(llmsys.parallel.__file__).parent / f"{name}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in imports for alias in node.names} | {
        getattr(node, "module", "") for node in imports
    }
    assert not {module for module in modules if module and module.split(".")[0] == "torch"}
