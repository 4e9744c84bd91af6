"""The process group of each axis, made at its first use."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from llmsys.parallel.mesh import Axis

_groups: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}
_timeout_s = 600.0


def group_of(axis: Axis) -> dist.ProcessGroup:
    """The group of these ranks, which must all come here at the same point of their programs."""
    key = axis.ranks, axis.channel
    if key not in _groups:
        _groups[key] = dist.new_group(
            list(axis.ranks), timeout=timedelta(seconds=_timeout_s), use_local_synchronization=True
        )
    return _groups[key]


def forget(timeout_s: float) -> None:
    """Make groups anew from here on, in which a collective waits `timeout_s` seconds at most."""
    global _timeout_s
    _groups.clear()
    _timeout_s = timeout_s
