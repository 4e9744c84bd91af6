"""Data parallelism, with optimizer state, gradients and parameters, each from some stage on, in parts on many ranks.

    zero = Zero(model, mesh, stage=3, units=model.blocks)
    optimizer = AdamW(zero.shards())
    for micro in batch: model.loss(*micro).backward()
    zero.reduce()
    optimizer.step()
    zero.gather()

    stage  parameters  gradients  optimizer
    0      whole       whole      whole
    1      whole       whole      1/N
    2      whole       1/N        1/N
    3      1/N         1/N        1/N

Source     Rajbhandari et al. 2020, arXiv:1910.02054
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llmsys.memory.offload import Ferry
from llmsys.ops.sink import Sink
from llmsys.parallel import collectives
from llmsys.parallel.buckets import Piece, buckets_of
from llmsys.parallel.flat import Fill, Flat
from llmsys.parallel.mesh import Axis, Mesh
from llmsys.parallel.offloaded import OffloadedFlat
from llmsys.parallel.units import Unit, Units

BUCKET_BYTES = 25 << 20
MAX_REDUCING = 1  # bucket whose gradients are on their way while those of the next are found, where that takes memory


class Optimizer(Protocol):
    def step(self, *args: Any, **options: Any) -> Any: ...


class Part(NamedTuple):
    """`shard[where]` are elements of a parameter, flat, from `start` of it on."""

    piece: Piece
    start: int
    shard: nn.Parameter
    where: slice


class Zero:
    """Parameters of `model` in flat buckets, whose gradients become their mean over `mesh.data`.

    Buckets are reduced during backward, each as its gradients are there, always in the same order; in stages 0 and 1
    only in the backward before `reduce`: the others run under `accumulating()`. Stages 2 and 3 reduce in each backward
    and keep their part of the sum, but under `holding()`.

    Stage 3 keeps parameters in parts, and what reads them must be a call of one of `units`, modules such as blocks, of
    a module that has parameters outside of them, of the model, or of its `enter` or `leave`. Each unit is whole from
    before its forward, or its backward, until after it, and the next one is on its way meanwhile. All ranks must call
    the same ones in the same order. Other readers go within `whole()`.

    units      in the order of the forward: those of stage 3; in stage 2, modules that are reduced in the backwards that
               come to them, and in no others, such as the chunks of a pipeline
    offload    shards, with masters and what the optimizer keeps, live on the host; gradients go there as they are
               reduced; `step` updates each bucket while others come and go
    shared     parameters that another pipeline stage holds too, by name, and that stage: their gradients are summed
               with its ones by `reduce`, once
    fill       writes parameters, by name, a bucket after the other: of a model whose parameters have no memory

    Shapes     of any model; frozen parameters stay as they are, in stage 3 in parts; tied ones are one
    Numerics   gradients are divided by the size of mesh.data, then summed over microbatches and ranks, in
               `reduce_dtype`, by default their own; the optimizer updates a master where `master_dtype` is not that of
               the parameter
    Traffic    each step, of Ψ bytes of gradients and parameters and N ranks: stage 0 2·(N − 1)/N·Ψ on data; stages 1
               and 2 as much on shard, half of it for each backward in stage 2, and 2·(M − 1)/M·Ψ/N on the M copies of
               each shard; stage 3 at most 3·(N − 1)/N·Ψ on shard for each forward and backward
    Errors     ValueError for a stage that is not one, a unit that is not of the model, or a model without parameters
               that ask for gradients; RuntimeError for a backward that this stage cannot take, for `reduce` without
               one, and for reading the state of parameters in parts
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        stage: int,
        units: Iterable[nn.Module] = (),
        bucket_bytes: int = BUCKET_BYTES,
        master_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        offload: bool = False,
        group_of: Callable[[str, nn.Parameter], Hashable] = lambda name, parameter: None,
        shared: Mapping[str, int] | None = None,
        fill: Fill | None = None,
    ):
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"llmsys.parallel.Zero: stage={stage}, expected 0, 1, 2 or 3")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("llmsys.parallel.Zero: no parameter asks for a gradient, expected some that do")
        self.stage, self.mesh = stage, mesh
        self.owners = mesh.shard if stage else Axis("shard", (mesh.rank,), 0)
        self._shared_with = dict(shared or {})
        self._postponed = False
        self._direct = self._adds_up = False  # of gradients that go to their buckets without being elsewhere
        self._reduces = False  # what a backward of this step found
        self._closed = False  # to another one
        self._backward = -1  # the number that autograd gives the one that is going on, or -1
        self._queue: deque[Flat] = deque()  # to reduce in it, in this order
        self._reducing: deque[Flat] = deque()
        self._ferries: dict[torch.device, Ferry] = {}
        flatten = partial(
            self._flatten,
            group_of=group_of,
            copies=mesh.copies if stage else mesh.data,
            keeps_whole=stage < 3,
            keeps_gradients=stage < 2,
            master_dtype=master_dtype,
            reduce_dtype=reduce_dtype,
            fill=fill,
            ferries=self._ferries if offload else None,
        )
        named = {name: p for name, p in model.named_parameters() if stage == 3 or p.requires_grad}
        modules = list(dict.fromkeys(units)) if stage > 1 else []
        inside, held = set(model.modules()), set(model.parameters())
        for i, module in enumerate(modules):
            own = set(module.parameters())
            if module not in inside and not (own and own <= held):
                raise ValueError(
                    f"llmsys.parallel.Zero: unit {i}, a {type(module).__name__}, expected modules of the "
                    f"{type(model).__name__}"
                )
        first, *others, last = _split(named, modules)
        flats = [
            flatten(first, bucket_bytes=bucket_bytes),
            *(flatten(part, bucket_bytes=None if stage == 3 else bucket_bytes) for part in others),
            flatten(last, bucket_bytes=bucket_bytes),
        ]
        # In the order of the backward: what may be reduced apart, and of it what is trained.
        self._parts = [[flat for flat in part if flat.trained] for part in reversed(flats)]
        self._flats = [flat for part in self._parts for flat in part]
        self._all = [flat for part in flats for flat in part]
        self._units = Units([Unit(part) for part in flats] if stage == 3 else [], self._notice)
        if stage == 3:
            self._units.enclose_model(model, modules, first | last)
            model.register_state_dict_pre_hook(self._check_whole)
            model.register_load_state_dict_pre_hook(self._check_whole)
        for flat in self._flats:
            for index, (node, parameter) in enumerate(zip(flat.nodes, flat.parameters, strict=True)):
                node.register_hook(partial(self._found, flat, index))
                if flat.gradient_dtype == parameter.dtype:
                    add, add_rows = partial(flat.add_product, index), partial(flat.add_rows, index)
                    Sink(parameter, add, add_rows, lambda: self._direct, lambda: self._adds_up).attach()

    def _flatten(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        group_of: Callable[[str, nn.Parameter], Hashable],
        bucket_bytes: int | None,
        ferries: dict[torch.device, Ferry] | None,
        **options: Any,
    ) -> list[Flat]:
        """In the order in which a backward finds gradients; without `bucket_bytes` one for each kind."""

        # Each shared parameter is a bucket of its own: whatever else a stage holds, its shard is the same part of it.
        def kind_of(name: str, p: nn.Parameter) -> Hashable:
            return group_of(name, p), p.dtype, p.device, p.requires_grad, name if name in self._shared_with else None

        size = max((p.element_size() for p in named.values()), default=1)
        buckets = buckets_of(
            ((name, tuple(p.shape), kind_of(name, p)) for name, p in named.items()),
            None if bucket_bytes is None else max(1, bucket_bytes // size),
            self.owners.size,
        )
        flats = []
        for bucket in buckets:
            parameters = [named[piece.name] for piece in bucket.pieces]
            device = parameters[0].device
            if ferries is None or not parameters[0].requires_grad:
                flats.append(Flat(bucket, parameters, self.owners, **options))
                continue
            if device not in ferries:
                ferries[device] = Ferry(device)
            flats.append(OffloadedFlat(bucket, parameters, self.owners, ferry=ferries[device], **options))
        return flats

    def _check_whole(self, module: nn.Module, *_: Any) -> None:
        if not self._units.all_here():
            raise RuntimeError(
                f"llmsys.parallel.Zero: the state of a {type(module).__name__} whose parameters are in parts, expected "
                "to be read within `with zero.whole():`, or loaded within `with zero.whole(write=True):`"
            )

    # ---- for the optimizer, and other readers ----

    def shards(self, group: Hashable = None) -> list[nn.Parameter]:
        """What an optimizer updates on this rank, of the parameters that `group_of` put into `group`."""
        return [flat.shard for flat in self._flats if flat.group == group]

    def parts(self) -> Iterator[Part]:
        """What this rank's shards have of each parameter, which may be nothing."""
        for flat in self._flats:
            for piece, start, place in flat.owned():
                yield Part(piece, start, flat.shard, place)

    def gradients(self) -> Iterator[tuple[Piece, int, Tensor]]:
        """Of each parameter, from which element on this rank's shard has its gradient, and that; after `reduce`."""
        for piece, start, shard, where in self.parts():
            assert shard.grad is not None
            yield piece, start, shard.grad[where]

    def holders(self, name: str) -> int:
        """How many pipeline stages hold this parameter."""
        return 2 if name in self._shared_with else 1

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self._flats[0].whole.device

    @contextmanager
    def whole(self, *, write: bool = False) -> Iterator[None]:
        """Parameters are whole, for `state_dict`, say; with `write`, shards and masters take what is written to them.

        Every rank must come here.
        """
        with self._units.all():
            yield
            if write:
                for flat in self._all:
                    flat.take_written()

    # ---- a step ----

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """A backward before the last one of a step: in stages 0 and 1 it sends nothing."""
        with self._postponing(self.stage < 2):
            yield

    @contextmanager
    def holding(self) -> Iterator[None]:
        """A backward of which another part follows, outside of this: no stage reduces before. Gradients stay whole."""
        with self._postponing(True):
            yield

    @contextmanager
    def direct(self, num_backwards: int) -> Iterator[None]:
        """Forwards and backwards of a step alone: gradients may go to their buckets without being elsewhere."""
        self._direct, self._adds_up = True, self.stage < 2 and num_backwards > 1
        try:
            yield
        finally:
            self._direct = self._adds_up = False

    @contextmanager
    def _postponing(self, postponed: bool) -> Iterator[None]:
        before = self._postponed
        self._postponed = before or postponed
        try:
            yield
        finally:
            self._postponed = before

    def reduce(self) -> None:
        """Wait for the mean of the gradients, which is then in `.grad` of the shards.

        What no backward outside of `holding()` came to again is reduced here.
        """
        self._queue = deque(flat for part in self._parts if any(flat.waits for flat in part) for flat in part)
        if not (self._queue or self._reduces):
            raise RuntimeError(
                "llmsys.parallel.Zero.reduce: no gradients, expected a backward since construction or `gather`"
            )
        while self._queue:
            self._start()
        for flat in self._flats:
            flat.finish_reduce()
        self._reducing.clear()
        for pending in [flat.start_copies() for flat in self._flats]:
            pending.wait()
        for flat in self._flats:
            flat.finish()
        shared = {flat.first_name: flat for flat in self._flats if flat.first_name in self._shared_with}
        for name in sorted(shared):
            grad = shared[name].shard.grad
            assert grad is not None
            there = grad.to(shared[name].whole.device)
            grad.copy_(collectives.sum_with(there, self.mesh.pp, self._shared_with[name]))
        self._reduces, self._closed = False, True

    def gather(self) -> None:
        """After the optimizer's step: every rank gets what the others updated, and gradients begin at zero."""
        for flat in self._flats:
            self._updated(flat)
        self._begin()

    def step(self, *optimizers: Optimizer, **options: Any) -> None:
        """`optimizer.step(**options)` of each and `gather()`, bucket by bucket: one is updated while others are on
        their way. An optimizer's `step` runs once for each bucket, whose gradient alone it then sees."""
        gradients = [flat.shard.grad for flat in self._flats]
        for flat in self._flats:
            flat.shard.grad = None
        for flat, gradient in zip(self._flats, gradients, strict=True):
            flat.shard.grad = gradient
            for optimizer in optimizers:
                optimizer.step(**options)
            flat.shard.grad = None
            self._updated(flat)
        self._begin()

    def _updated(self, flat: Flat) -> None:
        flat.send_back()
        if self.stage < 3:
            flat.start_gather()

    def _begin(self) -> None:
        if self.stage == 3:
            self._units.refresh()
        for flat in self._flats:
            flat.finish_gather()
            flat.begin()
        self._reduces, self._closed, self._backward = False, False, -1

    # ---- during backward ----

    def _notice(self) -> None:
        """The first call of a backward asks for one at its end, and sees what it will find."""
        backward = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        if backward == self._backward:
            return
        if self._backward >= 0:
            raise RuntimeError(
                "llmsys.parallel.Zero: a backward within one that has not ended, expected torch.utils.checkpoint with "
                "use_reentrant=False; after one that failed, `gather` begins anew"
            )
        if self._closed:
            raise RuntimeError(
                f"llmsys.parallel.Zero: a backward after the gradients of stage {self.stage} were reduced, expected "
                "`gather` before it, or earlier ones of a step under `accumulating()`"
            )
        self._backward = backward
        torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        if not self._postponed:
            for flat in self._flats:
                flat.await_gradients()
            # What no rank comes to has nothing to reduce.
            self._queue = deque(flat for part in self._parts if any(flat.missing for flat in part) for flat in part)

    def _found(self, flat: Flat, index: int, *nothing: object) -> None:
        """A parameter's gradient is complete."""
        self._notice()
        flat.add(index)
        if not self._postponed:
            flat.missing.discard(index)
            while self._queue and not self._queue[0].missing:
                self._start()

    def _end(self) -> None:
        """What no gradient came for this time has none: ranks must reduce the same buckets all the same."""
        if not self._postponed:
            while self._queue:
                self._start()
            self._reduces, self._closed = True, self.stage < 2
        self._backward = -1
        self._units.end()

    def _start(self) -> None:
        flat = self._queue.popleft()
        flat.start_reduce()
        self._reducing.append(flat)
        if len(self._reducing) > MAX_REDUCING and (self.stage > 1 or self._ferries):
            self._reducing.popleft().finish_reduce()


def _split(named: Mapping[str, nn.Parameter], units: Sequence[nn.Module]) -> list[dict[str, nn.Parameter]]:
    """What comes before all units, each one's parameters, and what else there is; each parameter once."""
    place = {parameter: i for i, unit in reversed([*enumerate(units, 1)]) for parameter in unit.parameters()}
    parts: list[dict[str, nn.Parameter]] = [{} for _ in range(len(units) + 2)]
    for name, parameter in named.items():
        first = not any(parts[1:])
        parts[place.get(parameter, 0 if first else -1)][name] = parameter
    return parts
