"""What ranks along an axis do together, with its gradient; the bytes that it sends, and who was missing if it fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmsys.parallel import exchange
from llmsys.parallel.groups import group_of
from llmsys.parallel.mesh import Axis

Map = Callable[[Tensor], Tensor]
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
INSIDE = *(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)), contextlib.__file__
# PyTorch 2.13 renames them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_by_backend = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_counters: list[Counter[str]] = []


class CollectiveError(RuntimeError):
    """A collective that other ranks did not come to, or left."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this rank sends meanwhile, by axis: what the ring algorithms send, whatever the backend does."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


# ---- without gradients ----


class Pending:
    """A collective on its way; its result is there after `wait`."""

    def __init__(self, name: str, axis: Axis, work: Any, result: Callable[[], Tensor]):
        self.name, self.axis, self.work, self.result = name, axis, work, result
        self.place = _call_site()

    def done(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self) -> Tensor:
        if self.work is not None:
            with _named(self.name, self.axis, self.place):
                self.work.wait()
            self.work = None
        return self.result()


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """The sum, or the "max", over the axis, in place of `x`."""
    return start_all_reduce(x, axis, op).wait()


def start_all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Pending:
    """As `all_reduce`; nothing may touch `x` before the wait.

    Traffic    2·(N − 1)/N of x on the axis, N its size
    """
    if axis.size == 1:
        return Pending("all_reduce", axis, None, lambda: x)
    _check_contiguous("all_reduce", x)
    _count(axis, 2 * x.nbytes * (axis.size - 1) // axis.size)
    with _named("all_reduce", axis):
        group = group_of(axis)
        if exchange.pays(x, group):
            work: Any = exchange.start_all_reduce(x, op, group)
        else:
            work = dist.all_reduce(x, OPS[op], group=group, async_op=True)
    return Pending("all_reduce", axis, work, lambda: x)


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Every rank's `x`, all of one shape, side by side along `dim` in the order of the axis."""
    return start_all_gather(x, axis, dim).wait()


def start_all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Pending:
    """As `all_gather`.

    Traffic    N − 1 times x on the axis, N its size
    """
    if axis.size == 1:
        return Pending("all_gather", axis, None, lambda: x)
    out = x.new_empty(axis.size, *x.shape)
    work = start_all_gather_into(out.view(-1), x.contiguous().view(-1), axis).work
    return Pending("all_gather", axis, work, lambda: _side_by_side(out, dim))


def start_all_gather_into(out: Tensor, x: Tensor, axis: Axis) -> Pending:
    """Every rank's flat `x` one after another in the flat `out`, of which `x` may be this rank's part.

    Traffic    N − 1 times x on the axis, N its size
    """
    work = None
    if axis.size > 1:
        _count(axis, x.nbytes * (axis.size - 1))
        with _named("all_gather", axis):
            work = _all_gather(out, x, group=group_of(axis), async_op=True)
    elif out.data_ptr() != x.data_ptr():
        out.copy_(x)
    return Pending("all_gather", axis, work, lambda: out)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's part along `dim` of the sum over the axis."""
    return start_reduce_scatter(x, axis, dim).wait()


def start_reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Pending:
    """As `reduce_scatter`.

    Traffic    (N − 1)/N of x on the axis, N its size
    Errors     ValueError if `dim` has no N equal parts
    """
    if axis.size == 1:
        return Pending("reduce_scatter", axis, None, lambda: x)
    parts = torch.stack(_parts("reduce_scatter", x, axis, dim))
    out = torch.empty_like(parts[0])
    work = start_reduce_scatter_into(out.view(-1), parts.view(-1), axis).work
    return Pending("reduce_scatter", axis, work, lambda: out)


def start_reduce_scatter_into(out: Tensor, x: Tensor, axis: Axis) -> Pending:
    """This rank's part of the sum of the flat `x`, in the flat `out`, which may be that part of `x` itself.

    Traffic    (N − 1)/N of x on the axis, N its size
    """
    work = None
    if axis.size > 1:
        _count(axis, x.nbytes * (axis.size - 1) // axis.size)
        with _named("reduce_scatter", axis):
            work = _reduce_scatter(out, x, group_of(axis))
    elif out.data_ptr() != x.data_ptr():
        out.copy_(x)
    return Pending("reduce_scatter", axis, work, lambda: out)


def _reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> Any:
    if dist.get_backend(group) == "gloo":
        return exchange.start_reduce_scatter(out, x, group)
    return _reduce_scatter_by_backend(out, x, group=group, async_op=True)


def all_to_all(x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
    """`x` cut along `split`, a part to each rank, and what comes from each rank side by side along `join`.

    Traffic    (N − 1)/N of x on the axis, N its size
    Errors     ValueError if `split` has no N equal parts
    """
    if axis.size == 1:
        return x
    parts = torch.stack(_parts("all_to_all", x, axis, split))
    _count(axis, x.nbytes * (axis.size - 1) // axis.size)
    out = torch.empty_like(parts)
    with _named("all_to_all", axis):
        dist.all_to_all_single(out, parts, group=group_of(axis))
    return _side_by_side(out, join)


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """In place of `x`, that of the rank `source` of the axis.

    Traffic    x on the axis, from all but the last rank of a chain
    """
    if axis.size > 1:
        _check_contiguous("broadcast", x)
        _count(axis, x.nbytes * (axis.rank != (source - 1) % axis.size))
        with _named("broadcast", axis):
            dist.broadcast(x, axis.ranks[source], group=group_of(axis))
    return x


def start_send(x: Tensor, axis: Axis, to: int, tag: int = 0) -> Pending:
    """`x` to the rank `to` of the axis, which must receive it.

    Traffic    x on the axis
    """
    x = x.contiguous()
    _count(axis, x.nbytes)
    with _named(f"send to rank {axis.ranks[to]}", axis):
        work = dist.isend(x, axis.ranks[to], group=group_of(axis), tag=tag)
    return Pending(f"send to rank {axis.ranks[to]}", axis, work, lambda: x)


def start_receive(out: Tensor, axis: Axis, source: int, tag: int = 0) -> Pending:
    """What the rank `source` of the axis sends, into `out`."""
    _check_contiguous("receive", out)
    with _named(f"receive from rank {axis.ranks[source]}", axis):
        work = dist.irecv(out, axis.ranks[source], group=group_of(axis), tag=tag)
    return Pending(f"receive from rank {axis.ranks[source]}", axis, work, lambda: out)


def sum_with(x: Tensor, axis: Axis, other: int) -> Tensor:
    """In place of `x`, its sum with that of the rank `other` of the axis, which must ask for the same.

    Traffic    x on the axis
    """
    theirs = torch.empty_like(x)
    if axis.rank < other:  # sends may wait for their receivers
        sending = start_send(x.clone(), axis, other)
        start_receive(theirs, axis, other).wait()
    else:
        start_receive(theirs, axis, other).wait()
        sending = start_send(x.clone(), axis, other)
    sending.wait()
    return x.add_(theirs)


# ---- with gradients ----


class _Function(torch.autograd.Function):
    """A linear map over an axis and its transpose."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.transpose = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(dy), None, None


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """`x`, the same on all ranks, into what each rank computes a part of: dx is the sum over the axis."""
    if axis.size == 1:
        return x
    return _Function.apply(x, lambda x: x.view_as(x), lambda dy: all_reduce(dy.clone(), axis))


def reduce_out(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, out of what each rank computed a part of: dx is dy, the same on all ranks."""
    if axis.size == 1:
        return x
    return _Function.apply(x, lambda x: all_reduce(x.clone(), axis), lambda dy: dy)


def gather_in(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Every rank's part along `dim`, into what each rank computes a part of: dx is this part of the sum of dy."""
    return _Function.apply(x, lambda x: all_gather(x, axis, dim), lambda dy: reduce_scatter(dy, axis, dim))


def scatter_out(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This part along `dim` of the sum over the axis; dx is every rank's part of dy."""
    return _Function.apply(x, lambda x: reduce_scatter(x, axis, dim), lambda dy: all_gather(dy, axis, dim))


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of `x`, the same on all ranks; dx is every rank's part of dy."""
    return _Function.apply(x, lambda x: own_part(x, axis, dim).contiguous(), lambda dy: all_gather(dy, axis, dim))


def join(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Every rank's part along `dim`, into what all ranks compute alike; dx is this part of dy."""
    return _Function.apply(x, lambda x: all_gather(x, axis, dim), lambda dy: own_part(dy, axis, dim).contiguous())


# ---- parts ----


def own_part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim`, a view; nothing is said to others, backward neither.

    Errors     ValueError if `dim` has no N equal parts
    """
    return _parts("own_part", x, axis, dim)[axis.rank]


def _parts(name: str, x: Tensor, axis: Axis, dim: int) -> tuple[Tensor, ...]:
    if x.shape[dim] % axis.size:
        raise ValueError(
            f"llmsys.parallel.{name}: dimension {dim} of {tuple(x.shape)}, expected a multiple of the {axis.size} "
            f"ranks of {axis}"
        )
    return x.chunk(axis.size, dim)


def _side_by_side(parts: Tensor, dim: int) -> Tensor:
    return parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(), dim)


def _check_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(
            f"llmsys.parallel.{name}: a tensor of strides {x.stride()}, expected a contiguous one, to change in place"
        )


# ---- accounts ----


def _count(axis: Axis, num_bytes: int) -> None:
    for counter in _counters:
        counter[axis.name] += num_bytes


@contextmanager
def _named(name: str, axis: Axis, place: str = "") -> Iterator[None]:
    """An error of the backend says who waited for whom, and where."""
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(
            f"llmsys.parallel.{name}: rank {axis.ranks[axis.rank]} on axis {axis}, called at {place or _call_site()}, "
            f"did not get through to the others: {str(error).splitlines()[0]}"
        ) from error


def _call_site() -> str:
    """Where the code is that asked, outside of this folder and of PyTorch, whose backward asks for a gradient's sum."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
