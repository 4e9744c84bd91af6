"""Joining a job: its ranks as a mesh, whose groups are tested before anything relies on them."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from llmsys.parallel import collectives
from llmsys.parallel.groups import forget
from llmsys.parallel.mesh import AXES, Axis, Mesh


def connect(*, timeout_s: float = 600.0, device: torch.device | str = "cpu", **sizes: int) -> Mesh:
    """Join the job that torchrun started, as a mesh of `sizes`; every group is tested once.

        mesh = connect(pp=2, dp=2, tp=2)

    Joins through NCCL for a CUDA device and Gloo for the CPU, or uses the process group that is there already. Each
    collective waits `timeout_s` seconds at most for the other ranks.
    Errors     ValueError if the sizes do not make as many ranks as the job has; RuntimeError if a group does not add up
    """
    forget(timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    mesh = Mesh(**sizes, rank=0)
    if mesh.size != dist.get_world_size():
        shape = " · ".join(f"{name} {size}" for name, size in sizes.items()) or "one rank"
        raise ValueError(
            f"llmsys.parallel.connect: {shape} is {mesh.size} ranks and the job has {dist.get_world_size()}, expected "
            f"sizes whose product is {dist.get_world_size()}"
        )
    mesh = Mesh(**sizes, rank=dist.get_rank())
    for name in AXES:
        _test(getattr(mesh, name), torch.device(device))
    return mesh


def disconnect() -> None:
    """Leave the job."""
    forget(600.0)
    if dist.is_initialized():
        dist.destroy_process_group()


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
