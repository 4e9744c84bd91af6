"""Schedules in PyTorch's CSV, read by us and by PyTorch."""

import pytest
import torch.distributed.pipelining.schedules as pytorch

from llmsys.parallel.schedule import SCHEDULES, Action, orders
from llmsys.parallel.schedule_csv import read_csv, write_csv
from llmsys.parallel.verify import verify


class Stage:
    """As much of a PipelineStage as PyTorch's schedules read before they run."""

    has_backward = True
    submod = None

    def __init__(self, index: int, stages: int, chunks: int):
        self.stage_index, self.group_rank, self.group_size, self.num_stages = index, 0, stages, chunks
        self.is_first, self.is_last = index == 0, index == chunks - 1


def pytorchs(kind: str, stages: int, micros: int, v: int):
    """PyTorch's schedule of that class."""
    return getattr(pytorch, kind)(
        [Stage(index * stages, stages, stages * v) for index in range(v)], micros, loss_fn=lambda *args: None
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("micros", [3, 8])
def test_pytorch_reads_ours(name, micros, tmp_path):
    """Its reader also puts a send and a receive at each hop, and raises where an action's input would never come."""
    stages, v = 4, SCHEDULES[name].chunks_per_stage or 2
    actions = orders(name, stages, micros, v)
    write_csv(actions, tmp_path / "ours.csv")
    assert read_csv(tmp_path / "ours.csv") == actions

    reader = pytorchs("_PipelineScheduleRuntime", stages, micros, v)
    reader._load_csv(str(tmp_path / "ours.csv"), format="compute_only")
    kind = {"F": "F", "B": "I" if SCHEDULES[name].split else "B", "W": "W"}
    read = [[str(action) for action in row] for row in order_of(reader)]
    assert read == [[f"{a.chunk}{kind[a.kind]}{a.micro}" for a in row] for row in actions]


@pytest.mark.parametrize(
    ("kind", "name", "stages", "micros", "v"),
    [
        ("ScheduleInterleaved1F1B", "interleaved_1f1b", 4, 8, 2),
        ("ScheduleInterleaved1F1B", "interleaved_1f1b", 4, 10, 3),
        ("ScheduleInterleaved1F1B", "interleaved_1f1b", 4, 3, 2),
        ("ScheduleZBVZeroBubble", "zb_v", 4, 12, 2),
        ("ScheduleZBVZeroBubble", "zb_v", 4, 5, 2),
        ("ScheduleInterleavedZeroBubble", None, 4, 8, 2),
        ("ScheduleLoopedBFS", None, 4, 8, 2),
    ],
)
def test_we_read_pytorchs(kind, name, stages, micros, v, tmp_path):
    """Where both have a schedule it is the same one."""
    schedule = pytorchs(kind, stages, micros, v)
    schedule._dump_csv(str(tmp_path / "theirs.csv"), format="compute_only")
    actions = read_csv(tmp_path / "theirs.csv")
    split = any(action.kind == "W" for row in actions for action in row)
    verify(actions, micros=micros, chunks=stages * v, split=split)
    if name:
        assert actions == orders(name, stages, micros, v)


def order_of(schedule):
    return [[action for action in row if action] for row in schedule.pipeline_order.values()]


def test_whole_backwards_beside_split_ones(tmp_path):
    (tmp_path / "mixed.csv").write_text("0F0,0F1,0I0,,0B1,0W0\n")
    assert read_csv(tmp_path / "mixed.csv") == [
        [
            Action("F", 0, 0),
            Action("F", 1, 0),
            Action("B", 0, 0),
            Action("B", 1, 0),
            Action("W", 1, 0),
            Action("W", 0, 0),
        ]
    ]


@pytest.mark.parametrize("cell", ["F0", "0F", "0X0", "0SEND_F0", "0F0 0F1"])
def test_errors(cell, tmp_path):
    (tmp_path / "bad.csv").write_text(f"0F0\n1F0,{cell}\n")
    with pytest.raises(
        ValueError, match=rf"^llmsys\.parallel\.read_csv: '{cell}' in row 1, column 1 of .*bad.csv, expec"
    ):
        read_csv(tmp_path / "bad.csv")
