"""Collectives over Gloo: what they compute, their gradients, the bytes they send, and what they say when they fail."""

import os
import re
import signal
import time

import pytest
import torch

from llmsys import parallel
from llmsys.parallel import Mesh, collectives
from tests.parallel.ranks import run

SHAPE = (4, 6, 12)


def tensors(size, seed=0):
    """That of each rank of the job."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(size)]


# ---- values ----


def values(sizes, name):
    mesh = parallel.connect(**sizes)
    axis = getattr(mesh, name)
    line = [tensors(mesh.size)[rank] for rank in axis.ranks]
    mine, total, n = line[axis.rank], sum(line), axis.size
    for dim in range(3):
        gathered = collectives.all_gather(mine.mT, axis, dim)
        assert torch.equal(gathered, torch.cat([x.mT for x in line], dim))
        if SHAPE[dim] % n:
            continue
        part = collectives.reduce_scatter(mine, axis, dim)
        torch.testing.assert_close(part, total.chunk(n, dim)[axis.rank], rtol=0, atol=1e-14)
        for join in range(3):
            swapped = collectives.all_to_all(mine, axis, dim, join)
            assert torch.equal(swapped, torch.cat([x.chunk(n, dim)[axis.rank] for x in line], join))
    whole = torch.full((n * mine.numel(),), torch.nan, dtype=mine.dtype)
    part = whole.chunk(n)[axis.rank].copy_(mine.flatten())
    collectives.start_all_gather_into(whole, part, axis).wait()
    assert torch.equal(whole, torch.cat([x.flatten() for x in line]))
    collectives.start_reduce_scatter_into(part, whole, axis).wait()
    torch.testing.assert_close(part, n * mine.flatten(), rtol=0, atol=1e-14)
    torch.testing.assert_close(collectives.all_reduce(mine.clone(), axis), total, rtol=0, atol=1e-14)
    assert torch.equal(collectives.broadcast(mine.clone(), axis, n - 1), line[-1])
    to, source = (axis.rank + 1) % n, (axis.rank - 1) % n
    pending = [collectives.start_receive(torch.empty(SHAPE, dtype=torch.float64), axis, source)]
    pending += [collectives.start_send(mine, axis, to)]
    assert torch.equal([each.wait() for each in pending][0], line[source])


@pytest.mark.parametrize("sizes, name", [({"tp": 2}, "tp"), ({"dp": 2, "tp": 2}, "dp"), ({"cp": 3}, "data")])
def test_values(sizes, name):
    run(Mesh(**sizes).size, values, sizes, name)


# ---- gradients ----


def gradient(name, dim):
    axis = parallel.connect(tp=2).tp
    x = tensors(2)[0 if name in ("copy_in", "split") else axis.rank].requires_grad_()
    function = getattr(collectives, name)
    y = function(x, axis) if name in ("copy_in", "reduce_out") else function(x, axis, dim)
    cotangents = torch.randn(2, *y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y * cotangents[0 if name in ("reduce_out", "join") else axis.rank]).sum().backward()
    return y.detach(), cotangents, x.grad


def simulated(name, dim, x):
    """y of each rank, of all ranks' x in one process."""
    maps = {
        "copy_in": lambda: [x[0], x[0]],
        "split": lambda: x[0].chunk(2, dim),
        "gather_in": lambda: [torch.cat(x, dim)] * 2,
        "scatter_out": lambda: (x[0] + x[1]).chunk(2, dim),
        "reduce_out": lambda: [x[0] + x[1]] * 2,
        "join": lambda: [torch.cat(x, dim)] * 2,
    }
    return maps[name]()


@pytest.mark.parametrize("name", ["copy_in", "reduce_out", "gather_in", "scatter_out", "split", "join"])
@pytest.mark.parametrize("dim", [0, 2])
def test_gradients(name, dim):
    """Of a sum over ranks where each computes something else, of one rank's where all compute the same."""
    found = run(2, gradient, name, dim)
    x = [x.requires_grad_() for x in tensors(2)]
    y, alike = simulated(name, dim, x), name in ("reduce_out", "join")
    sum((y[rank] * found[rank][1][rank]).sum() for rank in range(1 if alike else 2)).backward()
    for rank in range(2):
        torch.testing.assert_close(found[rank][0], y[rank].detach(), rtol=0, atol=1e-14)
        source = 0 if name in ("copy_in", "split") else rank
        torch.testing.assert_close(found[rank][2], x[source].grad, rtol=0, atol=1e-14)


# ---- bytes ----


def traffic():
    mesh = parallel.connect(tp=3)
    x = torch.zeros(6, 4)  # 96 bytes
    sent = []
    for call in (
        lambda: collectives.all_reduce(x, mesh.tp),
        lambda: collectives.all_gather(x, mesh.tp),
        lambda: collectives.reduce_scatter(x, mesh.tp),
        lambda: collectives.all_to_all(x, mesh.tp, 0, 0),
        lambda: collectives.broadcast(x, mesh.tp),
        lambda: collectives.all_reduce(x, mesh.pp),
    ):
        with parallel.counted() as counter:
            call()
        sent.append(dict(counter))
    return sent


def test_bytes_are_those_of_the_ring_algorithms():
    found = run(3, traffic)
    for rank, sent in enumerate(found):
        broadcast = 0 if rank == 2 else 96
        assert sent == [{"tp": 128}, {"tp": 192}, {"tp": 64}, {"tp": 64}, {"tp": broadcast}, {}]


# ---- faults ----


def left_alone(fault):
    """What rank 0 hears, and after how long, when rank 1 does not come."""
    mesh = parallel.connect(tp=2, timeout_s=2.0)
    collectives.all_reduce(torch.ones(3), mesh.tp)
    if mesh.rank == 1:
        if fault == "late":
            time.sleep(6)
        else:
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[fault])
    begin = time.monotonic()
    try:
        collectives.all_reduce(torch.ones(3), mesh.tp)
    except parallel.CollectiveError as error:
        raise SystemExit(f"{time.monotonic() - begin:.1f} s: {error}") from None


@pytest.mark.parametrize("fault", ["late", "killed", "stopped"])
def test_a_missing_rank_is_named_in_time(fault):
    with pytest.raises(AssertionError) as caught:
        run(2, left_alone, fault)
    found = re.search(
        r"SystemExit: ([\d.]+) s: llmsys.parallel.all_reduce: rank (\d) on axis tp \(ranks 0, 1\), called at "
        r"\S*test_collectives.py:\d+, did not get through to the others: ",
        str(caught.value),
    )
    assert found or fault == "killed" and "ended without a word" in str(caught.value), caught.value
    if found:
        assert float(found[1]) < 10


def wrong_sizes():
    for sizes, message in (({"tp": 3}, "tp 3 is 3 ranks and the job has 2"), ({"dp": 0}, "dp=0, expected 1 or more")):
        with pytest.raises(ValueError, match=message):
            parallel.connect(**sizes)
    axis = parallel.connect(tp=2).tp
    with pytest.raises(ValueError, match=r"dimension 0 of \(3, 2\), expected a multiple of the 2 ranks of tp"):
        collectives.reduce_scatter(torch.zeros(3, 2), axis)
    with pytest.raises(ValueError, match=r"a tensor of strides \(1, 3\), expected a contiguous one"):
        collectives.all_reduce(torch.zeros(2, 3).t(), axis)


def test_errors():
    run(2, wrong_sizes)
