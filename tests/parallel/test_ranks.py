"""The processes that run a case run the next one too, unless it failed."""

import os
import signal

import pytest
import torch

from llmsys.parallel import collectives, connect, groups
from tests.parallel import ranks


def identity():
    """Of this process: what it is, and the files and sockets that it holds, once groups of a case are there."""
    assert not groups._groups
    mesh = connect(dp=2)
    assert collectives.all_reduce(torch.ones(1), mesh.dp) == 2
    return os.getpid(), len(os.listdir("/proc/self/fd"))


def fails(how):
    if connect(dp=2).rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a fault of rank 1")
    signal.pause()  # rank 0 will never answer


def test_the_same_processes_without_what_the_last_case_left():
    first, second, third = (ranks.run(2, identity) for _ in range(3))
    assert {pid for pid, _ in first} == {pid for pid, _ in second}
    assert [files for _, files in second] == [files for _, files in third]


def test_results_are_values_by_rank():
    assert ranks.run(3, torch.full, (2,), 0.5)[2].tolist() == [0.5, 0.5]
    assert ranks.run(3, torch.distributed.get_rank) == [0, 1, 2]


@pytest.mark.parametrize(
    "how, message", [("raises", "rank 1:\nTraceback(.|\n)*ValueError: a fault of"), ("killed", "rank 1:\nthe process")]
)
def test_a_failure_ends_its_processes(how, message):
    before = ranks.run(2, os.getpid)
    with pytest.raises(AssertionError, match=message):
        ranks.run(2, fails, how)
    assert not set(before) & set(ranks.run(2, os.getpid))
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_rank_that_never_answers_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "TIMEOUT_S", 1.0)
    with pytest.raises(AssertionError, match=r"ranks 0, 1: no answer in 1 s"):
        ranks.run(2, signal.pause)
