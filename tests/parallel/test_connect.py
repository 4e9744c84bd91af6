"""Ranks that do not fit together, or do not come, are told so on every rank, in seconds; names of each attempt."""

import os
import re
import socket
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from llmsys import env
from llmsys.parallel import connect, disconnect
from llmsys.parallel.collectives import all_reduce
from llmsys.parallel.connect import once
from tests.parallel import ranks

WITHIN_S = 2.0  # for all to come


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def outside_a_job(function, *arguments):
    """What `function(rank, …)` does on a rank, whose group is not there yet: its error, and after how long."""
    rank = dist.get_rank()
    dist.barrier()  # all are in the group that goes
    dist.destroy_process_group()
    begin = time.monotonic()
    try:
        found = function(rank, *arguments)
    except (ValueError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    finally:
        disconnect()
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
            os.environ.pop(name, None)
    return found, time.monotonic() - begin


def join(port, rank, *, same=None, missing=(), address="127.0.0.1", size=3, attempt=0):
    if rank in missing:
        return None
    variables = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    mesh = connect(dp=3, connect_timeout_s=WITHIN_S, timeout_s=20, same=same and {"lr": same[rank]})
    return all_reduce(torch.ones(1), mesh.dp).item()


def answers(**given):
    """Of each rank: what it found, once all have been there for a while."""
    found = ranks.run(3, outside_a_job, partial(turned, partial(join, free_port(), **given)))
    assert all(seconds < WITHIN_S + 10 for _, seconds in found)  # the machine may be busy
    return [answer for answer, _ in found]


def turned(function, rank):
    return function(rank)


def test_all_come():
    assert answers(same=[1, 1, 1]) == [3.0] * 3


def test_settings_that_differ():
    message = (
        "RuntimeError: llmsys.parallel.connect: lr is 2 on rank 2 and 1 on rank 0, expected the same on every rank"
    )
    assert answers(same=[1, 1, 2]) == [message] * 3


def test_a_missing_rank():
    message = r"RuntimeError: llmsys\.parallel\.connect: ranks 1, 2 of 3 did not come within 2 s, expected all"
    there, *others = answers(missing=(1, 2))
    assert re.fullmatch(message, there)
    assert others == [None, None]


def test_nobody_at_the_address():
    message = (
        r"RuntimeError: llmsys\.parallel\.connect: rank [12] found nobody within 2 s at 127\.0\.0\.1:\d+: .*MASTER_ADDR"
    )
    absent, *others = answers(missing=(0,))
    assert absent is None
    assert all(re.match(message, other) for other in others), others


def test_sizes_that_do_not_make_the_job():
    message = (
        "ValueError: llmsys.parallel.connect: dp 3 is 3 ranks and the job has 4, expected sizes whose product is 4"
    )
    found = ranks.run(4, outside_a_job, partial(turned, partial(join, free_port(), size=4)))
    assert [answer for answer, _ in found] == [message] * 4


def attempts(port, rank):
    """Two attempts of one job, whose store outlives the first, and two connections in the second."""
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, multi_tenant=True, wait_for_workers=False)
    found = []
    for attempt in (0, 1, 1):
        found.append(join(port, rank, attempt=attempt))
        found.append(once(lambda attempt=attempt: f"folder {attempt}", keep="folder"))
        found.append(once(lambda attempt=attempt: attempt))
        disconnect()
    dist.TCPStore("127.0.0.1", port, is_master=False).add("done", 1)
    while rank == 0 and store.add("done", 0) < 3:
        time.sleep(0.01)
    return found


def test_each_attempt_has_its_own_names():
    expected = [3.0, "folder 0", 0, 3.0, "folder 0", 1, 3.0, "folder 0", 1]
    found = ranks.run(3, outside_a_job, partial(turned, partial(attempts, free_port())))
    assert [answer for answer, _ in found] == [expected] * 3


def mistakes():
    connect(dp=2)

    def fail(kind):
        raise kind("llmsys: no room")

    found = []
    for kind in (ValueError, OSError):
        with pytest.raises((ValueError, OSError, RuntimeError), match="llmsys: no room") as caught:
            once(partial(fail, kind))
        found.append(caught.type)
    return found


def test_every_rank_raises_what_the_first_one_does():
    assert ranks.run(2, mistakes) == [[ValueError, OSError], [ValueError, RuntimeError]]


def test_without_a_job(monkeypatch):
    with pytest.raises(ValueError, match=r"neither a process group nor RANK and WORLD_SIZE, .*torchrun"):
        connect()
    for variables, message in (
        ({"RANK": "0"}, r"no WORLD_SIZE beside the other variables"),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_PORT": "1"}, r"invalid literal .*'two'.*expected numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "here"}, r"RANK=2, WORLD_SIZE=2, .*expected a rank below"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=r"llmsys\.env: .*" + message):
            env.job()
