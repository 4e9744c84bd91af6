"""Joining a job: its ranks as a mesh, once all of them are there with the same code and settings, and sums are sums."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmsys import env
from llmsys.parallel import collectives
from llmsys.parallel.groups import forget
from llmsys.parallel.mesh import AXES, Axis, Mesh

HEAR_S = 3.0  # that rank 0 stays, at most, for the others to hear why it leaves
_stores: list[dist.Store] = []  # of the job, then under the names of this connection alone


def connect(
    *,
    timeout_s: float = 600.0,
    connect_timeout_s: float = 60.0,
    device: torch.device | str = "cpu",
    same: Mapping[str, object] | None = None,
    **sizes: Any,
) -> Mesh:
    """Join the job that torchrun started, as a mesh of `sizes`; every group is tested once.

        mesh = connect(pp=2, dp=2, tp=2)

    Joins through NCCL for a CUDA device and Gloo for the CPU, or uses the process group that is there already. Each
    collective waits `timeout_s` seconds at most for the other ranks. Under `torchrun --max-restarts` each attempt has
    names of its own in the agent's store, which outlives them.

    same       what else must be alike on all ranks, besides `sizes` and the versions of llmsys and torch, by name

    Errors     on every rank: RuntimeError within `connect_timeout_s` seconds if nobody is at the job's address, a rank
               does not come, or ranks differ in what must be alike; RuntimeError if a group does not add up; ValueError
               if the sizes do not make as many ranks as the job has, or there is no job
    """
    forget(timeout_s)
    job = None if dist.is_initialized() else _job()
    if job:
        whole = _open(job, connect_timeout_s)
        rank, world_size = job.rank, job.world_size
    else:
        whole = dist.distributed_c10d._get_default_store()
        rank, world_size = dist.get_rank(), dist.get_world_size()
    attempt = dist.PrefixStore(f"attempt {job.attempt if job else 0}", whole)
    number = attempt.add(f"connections of rank {rank}", 1)
    own = dist.PrefixStore(f"connection {number}", attempt)
    _stores[:] = whole, own
    alike = {"llmsys": _source(), "torch": torch.__version__, "sizes": sizes, **(same or {})}
    _meet(own, rank, world_size, {name: str(value) for name, value in alike.items()}, connect_timeout_s)
    if job:
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        groups = dist.PrefixStore("groups", own)
        dist.init_process_group(
            backend, store=groups, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
    mesh = Mesh(**sizes, rank=0)
    if mesh.size != world_size:
        shape = " · ".join(f"{name} {size}" for name, size in sizes.items() if name != "shard") or "one rank"
        raise ValueError(
            f"llmsys.parallel.connect: {shape} is {mesh.size} ranks and the job has {world_size}, expected "
            f"sizes whose product is {world_size}"
        )
    mesh = Mesh(**sizes, rank=rank)
    for name in AXES:
        _test(getattr(mesh, name), torch.device(device))
    return mesh


def disconnect() -> None:
    """Leave the job."""
    forget(600.0)
    _stores.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def once(function: Callable[[], Any], keep: str | None = None) -> Any:
    """What `function()`, which rank 0 alone calls, gives or raises, on every rank, as JSON has it.

    All ranks call `once`, after `connect`. However long it takes: others wait for rank 0 without a time-out. With a
    name to `keep` it under, a result of an earlier attempt of the job, before torchrun restarted it, is given again.

    Errors     ValueError, OSError or RuntimeError, which each rank raises as rank 0 does
    """
    whole, own = _stores
    key = f"answer {own.add(f'questions of rank {dist.get_rank()}', 1)}"
    if dist.get_rank() == 0:
        try:
            if keep is not None and whole.check([keep]):
                answer = whole.get(keep).decode()
            else:
                answer = json.dumps(function())
        except (ValueError, OSError, RuntimeError) as error:
            own.set(key, json.dumps({"error": str(error), "invalid": isinstance(error, ValueError)}))
            _stay(own, key, dist.get_world_size() - 1)
            raise
        if keep is not None:
            whole.set(keep, answer)
        own.set(key, f'{{"result": {answer}}}')
    own.wait([key], timedelta(days=30))
    found = json.loads(own.get(key))
    if "error" in found:
        own.add(f"{key} heard", 1)
        raise (ValueError if found["invalid"] else RuntimeError)(found["error"])
    return found["result"]


# ---- meeting ----


def _job() -> env.Job:
    job = env.job()
    if job is None:
        raise ValueError(
            "llmsys.parallel.connect: neither a process group nor RANK and WORLD_SIZE, expected a job; "
            "start with torchrun --nproc-per-node <ranks>"
        )
    return job


def _open(job: env.Job, timeout_s: float) -> dist.Store:
    host = not job.agent_store and job.rank == 0
    try:
        return dist.TCPStore(
            *(job.address, job.port),
            is_master=host,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        place, reason = f"{job.address}:{job.port}", str(error).splitlines()[0]
        failed = f"could not listen at {place}" if host else f"found nobody within {timeout_s:g} s at {place}"
        raise RuntimeError(
            f"llmsys.parallel.connect: rank {job.rank} {failed}: {reason}, expected "
            f"{'an address of this host and a free port' if host else 'the host of rank 0'}; check MASTER_ADDR and "
            "MASTER_PORT"
        ) from error


def _meet(store: dist.Store, rank: int, world_size: int, alike: dict[str, str], timeout_s: float) -> None:
    """Wait until every rank is there and has alike what rank 0 has, else raise the same error everywhere."""
    within = timedelta(seconds=timeout_s)
    store.set(f"rank {rank}", json.dumps(alike))
    if rank == 0:
        complaint = _complaint(store, world_size, alike, timeout_s)
        store.set("complaint", complaint)
    else:
        if not _came(store, ["rank 0"], within) or not _came(store, ["complaint"], within + timedelta(seconds=5)):
            raise RuntimeError(
                f"llmsys.parallel.connect: rank 0 did not come within {timeout_s:g} s of rank {rank}, expected all "
                f"{world_size} ranks"
            )
        complaint = store.get("complaint").decode()
    if complaint:
        if rank == 0:
            _stay(store, "complaint", sum(store.check([f"rank {other}"]) for other in range(1, world_size)))
        else:
            store.add("complaint heard", 1)
        raise RuntimeError(f"llmsys.parallel.connect: {complaint}")


def _complaint(store: dist.Store, world_size: int, alike: dict[str, str], timeout_s: float) -> str:
    """What is wrong with the other ranks, or nothing."""
    keys = [f"rank {rank}" for rank in range(world_size)]
    if not _came(store, keys, timedelta(seconds=timeout_s)):
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        return (
            f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {world_size} did not come within {timeout_s:g} s, "
            "expected all"
        )
    for rank, key in enumerate(keys):
        theirs = json.loads(store.get(key))
        for name in sorted({*alike, *theirs}):
            if theirs.get(name) != alike.get(name):
                return (
                    f"{name} is {theirs.get(name)} on rank {rank} and {alike.get(name)} on rank 0, expected the same "
                    "on every rank"
                )
    return ""


def _came(store: dist.Store, keys: list[str], within: timedelta) -> bool:
    try:
        store.wait(keys, within)
    except dist.DistStoreError:
        return False
    return True


def _stay(store: dist.Store, key: str, others: int) -> None:
    """Until the others have heard, whom a launcher may end when this rank has."""
    end = time.monotonic() + HEAR_S
    while store.add(f"{key} heard", 0) < others and time.monotonic() < end:
        time.sleep(0.01)


@cache
def _source() -> str:
    """The hash of all Python source of llmsys."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return f"source {digest.hexdigest()[:12]}"


# ---- sums ----


def _test(axis: Axis, device: torch.device) -> None:
    """What every collective here relies on: sums are sums, and parts come in the order of the axis."""
    if axis.size == 1:
        return
    mine = torch.tensor([float(axis.rank + 1)], device=device)
    total = axis.size * (axis.size + 1) / 2
    everyone = torch.arange(1.0, axis.size + 1, device=device)
    for name, found, expected in (
        ("all_reduce", collectives.all_reduce(mine.clone(), axis), everyone.sum().view(1)),
        ("all_gather", collectives.all_gather(mine, axis), everyone),
        ("reduce_scatter", collectives.reduce_scatter(everyone * mine, axis), mine * total),
    ):
        if not torch.equal(found, expected):
            raise RuntimeError(
                f"llmsys.parallel.connect: {name} over {axis} gave {found.tolist()}, expected {expected.tolist()}; "
                f"{dist.get_backend()} of torch {torch.__version__} cannot be used"
            )
