"""Communication of a region of tensor parallelism, under way while chunks of the sequence are multiplied.

What enters arrives chunk by chunk, and each is multiplied when it is there; what leaves is on its way as soon as its
chunk is. Backward does the same the other way round. A chunk is of every rank's part of the sequence, so that its
tokens are not neighbours: `in_order` and `by_chunks` are the ways between chunks and the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmsys.parallel import collectives
from llmsys.parallel.collectives import Pending
from llmsys.parallel.mesh import Axis

TOKENS = 1  # the dimension of a sequence in (B, T, D)
Start = Callable[[Tensor], Pending]


class Overlap:
    """How a region's communication is cut into `num_chunks`, or less where there are fewer tokens."""

    def __init__(self, axis: Axis, sequence_parallel: bool, num_chunks: int):
        self.parts, self.num_chunks = axis.size if sequence_parallel else 1, num_chunks
        gather: Start = partial(collectives.start_all_gather, axis=axis, dim=TOKENS)
        scatter: Start = partial(collectives.start_reduce_scatter, axis=axis, dim=TOKENS)
        self.enter, self.leave = (gather, scatter), (scatter, gather)
        if not sequence_parallel:
            self.enter, self.leave = (_there, partial(_total, axis)), (partial(_total, axis), _there)

    def arriving(self, x: Tensor) -> Arriving:
        """The chunks of what enters, of every rank."""
        return Arriving(x, self.num_chunks, *self.enter)

    def left(self, chunks: Iterator[Tensor]) -> Tensor:
        """What leaves, of chunks each of which is made while those before are on their way."""
        start, start_back = self.leave
        leaving: list[Pending] = []
        returning: dict[int, Pending] = {}
        sent = [_Depart.apply(y, index, start, leaving, returning) for index, y in enumerate(chunks)]
        return _Left.apply(start_back, leaving, returning, *sent)

    def in_order(self, chunks: Sequence[Tensor]) -> Tensor:
        """A sequence, of chunks as they arrive."""
        return torch.cat([x.unflatten(TOKENS, (self.parts, -1)) for x in chunks], TOKENS + 1).flatten(
            TOKENS, TOKENS + 1
        )

    def by_chunks(self, x: Tensor) -> Iterator[Tensor]:
        """Chunks as they leave, of a sequence."""
        for chunk in x.unflatten(TOKENS, (self.parts, -1)).chunk(self.num_chunks, TOKENS + 1):
            yield chunk.flatten(TOKENS, TOKENS + 1)


def _total(axis: Axis, x: Tensor) -> Pending:
    return collectives.start_all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


def _there(x: Tensor) -> Pending:
    """Nothing to wait for."""
    return Pending("nothing", Axis("none", (0,), 0), None, lambda: x)


class Arriving:
    """Chunks, each waited for where it is first used. A region gives it to its column layers in place of x."""

    def __init__(self, x: Tensor, num_chunks: int, start: Start, start_back: Start):
        self._pending: list[Pending] = []
        self._returning: dict[int, Pending] = {}
        self._start_back = start_back
        self._own = _Enter.apply(x, num_chunks, start, self._pending, self._returning)
        self._arrived: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        for index, own in enumerate(self._own):
            if index == len(self._arrived):
                pending = self._pending[index]
                self._arrived.append(_Arrive.apply(own, index, pending, self._start_back, self._returning))
            yield self._arrived[index]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"llmsys.parallel.tensor: a region reads {name!r} of what enters it, expected it given to column layers "
            "alone, or a region that says it is `tokenwise`; use overlap_chunks=1"
        )


# ---- with gradients: two ends of each way. What lies between them is on its way, and read at the other end alone ----


class _Enter(torch.autograd.Function):
    """Forward starts all chunks; backward waits for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_chunks: int, start: Start, pending: list, returning: dict) -> tuple:
        ctx.returning = returning
        chunks = x.chunk(num_chunks, TOKENS)
        pending += [start(chunk) for chunk in chunks]
        return tuple(_nothing(chunk, chunk.shape) for chunk in chunks)

    @staticmethod
    def backward(ctx: Any, *nothing: Tensor) -> tuple:
        found = [ctx.returning.pop(index).wait() for index in range(len(nothing))]
        return torch.cat(found, TOKENS), None, None, None, None


class _Arrive(torch.autograd.Function):
    """Forward waits for a chunk; backward starts it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, index: int, pending: Pending, start_back: Start, returning: dict) -> Tensor:
        ctx.shape, ctx.index, ctx.start_back, ctx.returning = own.shape, index, start_back, returning
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        ctx.returning[ctx.index] = ctx.start_back(dy)
        return _nothing(dy, ctx.shape), None, None, None, None


class _Depart(torch.autograd.Function):
    """Forward starts a chunk; backward waits for it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, index: int, start: Start, leaving: list, returning: dict) -> Tensor:
        ctx.index, ctx.returning = index, returning
        leaving.append(start(y))
        return _nothing(y, y.shape)

    @staticmethod
    def backward(ctx: Any, nothing: Tensor) -> tuple:
        return ctx.returning.pop(ctx.index).wait(), None, None, None, None


class _Left(torch.autograd.Function):
    """Forward waits for all chunks; backward starts all, the last one, which backward uses first, before the others."""

    @staticmethod
    def forward(ctx: Any, start_back: Start, leaving: list, returning: dict, *sent: Tensor) -> Tensor:
        found = [pending.wait() for pending in leaving]
        ctx.start_back, ctx.returning = start_back, returning
        ctx.shapes, ctx.sizes = [each.shape for each in sent], [chunk.shape[TOKENS] for chunk in found]
        return torch.cat(found, TOKENS)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        for index, chunk in reversed(list(enumerate(dy.split(ctx.sizes, TOKENS)))):
            ctx.returning[index] = ctx.start_back(chunk)
        return None, None, None, *(_nothing(dy, shape) for shape in ctx.shapes)


def _nothing(x: Tensor, shape: torch.Size) -> Tensor:
    """A tensor like x, of a shape, without memory for it."""
    return x.new_zeros(()).expand(shape)
