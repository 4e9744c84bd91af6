"""Data parallelism, with the optimizer's state, and the gradients, of each parameter on one rank of the shard axis.

    zero = Zero(model, mesh, stage=2)
    optimizer = AdamW(zero.shards())
    for micro in batch: model.loss(*micro).backward()
    zero.reduce()
    optimizer.step()
    zero.gather()

    stage  parameters  gradients  optimizer
    0      whole       whole      whole
    1      whole       whole      1/N
    2      whole       1/N        1/N

Source     Rajbhandari et al. 2020, arXiv:1910.02054
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llmsys.parallel import collectives
from llmsys.parallel.buckets import Bucket, Piece, buckets_of
from llmsys.parallel.collectives import Pending
from llmsys.parallel.mesh import Axis, Mesh

BUCKET_BYTES = 25 << 20


@dataclass
class _Flat:
    """A bucket's tensors on this rank."""

    bucket: Bucket
    parameters: list[nn.Parameter]
    whole: Tensor  # the parameters are views of it
    shard: nn.Parameter  # what the optimizer updates: of `whole`, or the master of that part
    gradients: Tensor | None = None  # the same of the gradients, where they stay whole
    missing: set[int] = field(default_factory=set)  # of parameters, whose gradients this backward has not found yet
    pending: Pending | None = None


class Zero:
    """Parameters of `model` in flat buckets, whose gradients become their mean over `mesh.data`.

    Buckets are reduced during backward, each as its gradients are there, always in the same order; in stages 0 and 1
    only in the backward before `reduce`: the others run under `accumulating()`. Stage 2 reduces in each backward and
    keeps its part of the sum.

    shared     parameters that another pipeline stage holds too, by name, and that stage: their gradients are summed
               with its ones by `reduce`, once

    Shapes     of any model; frozen parameters stay as they are, tied ones are one
    Numerics   gradients are summed in their own dtype, divided by the size of mesh.data before; a master is kept where
               `master_dtype` is not that of the parameter
    Traffic    each step, of Ψ bytes of gradients and parameters and N ranks: stage 0 2·(N − 1)/N·Ψ on data; stages 1
               and 2 as much on shard, and 2·(M − 1)/M·Ψ/N on the M copies of each shard
    Errors     ValueError for a stage that is not one, or a model without parameters that ask for gradients
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        stage: int,
        bucket_bytes: int = BUCKET_BYTES,
        master_dtype: torch.dtype | None = None,
        group_of: Callable[[str, nn.Parameter], Hashable] = lambda name, parameter: None,
        shared: Mapping[str, int] | None = None,
    ):
        if stage not in (0, 1, 2):
            raise ValueError(f"llmsys.parallel.Zero: stage={stage}, expected 0, 1 or 2")
        self.stage, self.mesh = stage, mesh
        self.owners = mesh.shard if stage else Axis("shard", (mesh.rank,), 0)
        self.copies = mesh.copies if stage else mesh.data
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not named:
            raise ValueError("llmsys.parallel.Zero: no parameter asks for a gradient, expected some that do")
        size = max(parameter.element_size() for parameter in named.values())
        shared = shared or {}
        # Each shared parameter is a bucket of its own: whatever else a stage holds, its shard is the same part of it.
        kinds = {
            name: (group_of(name, p), p.dtype, p.device, name if name in shared else None) for name, p in named.items()
        }
        buckets = buckets_of(
            ((name, tuple(p.shape), kinds[name]) for name, p in named.items()),
            max(1, bucket_bytes // size),
            self.owners.size,
        )
        self._flats = [self._flatten(bucket, named, master_dtype) for bucket in buckets]
        self._shared = [
            (flat, shared[flat.bucket.pieces[0].name]) for flat in self._flats if flat.bucket.pieces[0].name in shared
        ]
        self._shared.sort(key=lambda pair: pair[0].bucket.pieces[0].name)
        self._accumulating = False
        self._backward = -1  # the number that autograd gives the one that is going on
        for flat in self._flats:
            for index, parameter in enumerate(flat.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._found, flat, index))
        self._begin()

    def _flatten(self, bucket: Bucket, named: dict[str, nn.Parameter], master_dtype: torch.dtype | None) -> _Flat:
        parameters = [named[piece.name] for piece in bucket.pieces]
        whole = parameters[0].new_zeros(bucket.size)
        for piece, parameter in zip(bucket.pieces, parameters, strict=True):
            view = whole[piece.start : piece.end].view(piece.shape)
            view.copy_(parameter.data)
            parameter.data = view
        mine = self._mine(whole)
        master = mine if master_dtype in (None, whole.dtype) else mine.to(master_dtype)
        flat = _Flat(bucket, parameters, whole, nn.Parameter(master))
        if self.stage < 2:
            flat.gradients = torch.zeros_like(whole)
        return flat

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.owners.size)[self.owners.rank]

    def shards(self, group: Hashable = None) -> list[nn.Parameter]:
        """What an optimizer updates on this rank, of the parameters that `group_of` put into `group`."""
        return [flat.shard for flat in self._flats if flat.bucket.kind[0] == group]  # type: ignore[index]

    def gradients(self) -> Iterator[tuple[Piece, int, Tensor]]:
        """Of each parameter, from which element on this rank's shard has its gradient, and that; after `reduce`."""
        for flat in self._flats:
            assert flat.shard.grad is not None
            begin = self.owners.rank * flat.shard.numel()
            for piece in flat.bucket.pieces:
                first, end = (min(max(at - begin, 0), flat.shard.numel()) for at in (piece.start, piece.end))
                yield piece, begin + first - piece.start, flat.shard.grad[first:end]

    def holders(self, name: str) -> int:
        """How many pipeline stages hold this parameter."""
        return 1 + any(flat.bucket.pieces[0].name == name for flat, _ in self._shared)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """A backward before the last one of a step: in stages 0 and 1 it sends nothing."""
        self._accumulating = self.stage < 2
        try:
            yield
        finally:
            self._accumulating = False

    def reduce(self) -> None:
        """Wait for the mean of the gradients, which is then in `.grad` of the shards."""
        for flat in self._flats:
            self._finish(flat)
        for flat, stage in self._shared:
            assert flat.shard.grad is not None
            collectives.sum_with(flat.shard.grad, self.mesh.pp, stage)

    def gather(self) -> None:
        """After the optimizer's step: every rank gets what the others updated, and gradients begin at zero."""
        pending = []
        for flat in self._flats:
            mine = self._mine(flat.whole)
            if flat.shard.data_ptr() != mine.data_ptr():
                mine.copy_(flat.shard.data)
            pending.append(collectives.start_all_gather(mine, self.owners))
        for flat, work in zip(self._flats, pending, strict=True):
            if self.owners.size > 1:
                flat.whole.copy_(work.wait())
            flat.shard.grad = None
            if flat.gradients is not None:
                flat.gradients.zero_()
        self._begin()

    # ---- during backward ----

    def _begin(self) -> None:
        """Gradients accumulate where they are to be reduced."""
        self._await()
        for flat in self._flats:
            for piece, parameter in zip(flat.bucket.pieces, flat.parameters, strict=True):
                if flat.gradients is not None:
                    parameter.grad = flat.gradients[piece.start : piece.end].view(piece.shape)

    def _found(self, flat: _Flat, index: int, parameter: nn.Parameter) -> None:
        """A parameter's gradient is complete. The first one of a backward asks for a call at its end."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        flat.missing.discard(index)
        if not self._accumulating:
            while self._next < len(self._flats) and not self._flats[self._next].missing:
                self._start(self._flats[self._next])

    def _end(self) -> None:
        """What no gradient came for this time has none: ranks must reduce the same buckets all the same."""
        if not self._accumulating:
            while self._next < len(self._flats):
                self._start(self._flats[self._next])
        self._await()

    def _await(self) -> None:
        """Ready for a backward, which has found nothing yet."""
        self._next = 0  # bucket to reduce
        for flat in self._flats:
            flat.missing = set(range(len(flat.parameters)))

    def _start(self, flat: _Flat) -> None:
        self._next += 1
        self._finish(flat)
        found = flat.gradients if flat.gradients is not None else self._collected(flat)
        flat.pending = collectives.start_reduce_scatter(found.div(self.mesh.data.size), self.owners)

    def _collected(self, flat: _Flat) -> Tensor:
        """Stage 2: this backward's gradients, flat, which then live there no more."""
        found = torch.zeros_like(flat.whole)
        for piece, parameter in zip(flat.bucket.pieces, flat.parameters, strict=True):
            if parameter.grad is not None:
                found[piece.start : piece.end].view(piece.shape).copy_(parameter.grad)
                parameter.grad = None
        return found

    def _finish(self, flat: _Flat) -> None:
        if flat.pending is None:
            return
        found = collectives.all_reduce(flat.pending.wait().contiguous(), self.copies).to(flat.shard.dtype)
        flat.pending = None
        if self.stage < 2 or flat.shard.grad is None:
            flat.shard.grad = found
        else:
            flat.shard.grad += found
