"""Pipeline parallelism: each stage holds some runs of a model's blocks, and executes its list of actions.

A model that can be cut says what its parts are: `enter(tokens)` gives what the first block is given, `run(x, blocks,
sequence_length)` goes through some blocks, `leave(x, targets)` gives the loss; `ends()` names the children that enter
and leave use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.parallel import collectives
from llmsys.parallel.balance import balanced
from llmsys.parallel.collectives import Pending
from llmsys.parallel.mesh import Axis
from llmsys.parallel.schedule import SCHEDULES, Action, orders

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 7  # of what passes between stages


class Pipeline:
    """This rank's stage of `model`, of which it keeps no more, under the names that it has in the whole.

        pipeline = Pipeline(model, "blocks", mesh.pp, schedule="1f1b")
        loss = pipeline.step(microbatches)      # forward and backward of all; gradients as if of their mean loss

    blocks     the name of the model's list of blocks
    costs      of the blocks in order, in any unit: runs are cut so that the largest is least; alike by default
    shared     after this: parameters that both ends hold, by name, and the axis over which their gradients must be
               summed, once all microbatches and data parallel ranks are

    Traffic    of a microbatch, its activations from each chunk to the next on another stage, and as much back
    Errors     ValueError for a schedule that is not one, or splits the backward, or more chunks than blocks
    """

    def __init__(
        self,
        model: Any,
        blocks: str,
        axis: Axis,
        *,
        schedule: str = "1f1b",
        chunks_per_stage: int | None = None,
        costs: Sequence[float] | None = None,
    ):
        whole = [name for name, each in SCHEDULES.items() if not each.split]
        if schedule not in whole:
            raise ValueError(f"llmsys.parallel.Pipeline: schedule {schedule!r}, expected one of {', '.join(whole)}")
        self.model, self.axis, self.schedule = model, axis, schedule
        self.chunks_per_stage = chunks_per_stage
        self.num_chunks = 1 + max(
            action.chunk for row in orders(schedule, axis.size, 1, chunks_per_stage) for action in row
        )
        self.stages = [SCHEDULES[schedule].stage_of(chunk, axis.size) for chunk in range(self.num_chunks)]
        every = list(model.get_submodule(blocks))
        runs = balanced([1.0] * len(every) if costs is None else costs, self.num_chunks)
        own = {chunk: runs[chunk] for chunk in range(self.num_chunks) if self.stages[chunk] == axis.rank}
        self.blocks: dict[int, list[nn.Module]] = {chunk: [every[i] for i in run] for chunk, run in own.items()}
        setattr(model, blocks, nn.ModuleDict({str(i): every[i] for run in own.values() for i in run}))
        self.shared = self._keep_ends(0 in own, self.num_chunks - 1 in own)
        self._known: dict[tuple[int, ...], tuple[tuple[int, ...], torch.dtype]] = {}
        self._sending: list[Pending] = []

    def _keep_ends(self, first: bool, last: bool) -> dict[str, Axis]:
        enter, leave = self.model.ends()
        for name in {*enter, *leave}:
            if not (first and name in enter or last and name in leave):
                setattr(self.model, name, None)
        ends = sorted({self.stages[0], self.stages[-1]})
        if len(ends) == 1 or not (first or last):
            return {}
        axis = Axis(
            f"{self.axis.name} ends", tuple(self.axis.ranks[stage] for stage in ends), ends.index(self.axis.rank)
        )
        return {
            f"{name}.{parameter}": axis
            for name in set(enter) & set(leave)
            for parameter, _ in self.model.get_submodule(name).named_parameters()
        }

    def step(
        self,
        micros: Sequence[tuple[Tensor, Tensor]],
        *,
        accumulating: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Mean loss of the microbatches (tokens, targets), which every stage is given, on every stage.

        Gradients are added to what is there. Every backward but this stage's last one runs under `accumulating()`.
        """
        actions = orders(self.schedule, self.axis.size, len(micros), self.chunks_per_stage)[self.axis.rank]
        backwards = sum(action.kind == "B" for action in actions)
        inputs: dict[Action, Tensor] = {}
        outputs: dict[Action, Tensor] = {}
        arrived: dict[Action, Tensor] = {}  # from a chunk of this stage
        losses: list[Tensor] = []
        for action in actions:
            tokens, targets = micros[action.micro]
            forward = action._replace(kind="F")
            if action.kind == "F":
                x = self._input(action, tokens, arrived)
                y = self.model.run(x, self.blocks[action.chunk], tokens.shape[-1])
                if action.chunk == self.num_chunks - 1:
                    y = self.model.leave(y, targets)
                    losses.append(y.detach())
                    y = y / len(micros)
                else:
                    self._pass_on(action, action.chunk + 1, y.detach(), tokens, arrived)
                inputs[forward], outputs[forward] = x, y
            else:
                backwards -= 1
                x, y = inputs.pop(forward), outputs.pop(forward)
                dy = self._gradient(action, y, arrived)
                with accumulating() if backwards else nullcontext():
                    torch.autograd.backward(y, dy)
                if action.chunk > 0:
                    assert x.grad is not None
                    self._pass_on(action, action.chunk - 1, x.grad, tokens, arrived)
        for pending in self._sending:
            pending.wait()
        self._sending.clear()
        return self._mean(losses, micros)

    def _mean(self, losses: list[Tensor], micros: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        mean = torch.stack(losses).double().mean() if losses else torch.zeros((), dtype=torch.float64)
        return collectives.broadcast(mean.to(micros[0][0].device), self.axis, self.stages[-1])

    # ---- from chunk to chunk ----

    def _input(self, action: Action, tokens: Tensor, arrived: dict[Action, Tensor]) -> Tensor:
        if action.chunk == 0:
            return self.model.enter(tokens)
        source = self.stages[action.chunk - 1]
        made = action._replace(chunk=action.chunk - 1)
        if source == self.axis.rank:
            return arrived.pop(made).requires_grad_()
        if tuple(tokens.shape) not in self._known:
            self._known[tuple(tokens.shape)] = self._read_header(made, source, tokens.device)
        shape, dtype = self._known[tuple(tokens.shape)]
        out = torch.empty(shape, dtype=dtype, device=tokens.device)
        return collectives.start_receive(out, self.axis, source, self._tag(made)).wait().requires_grad_()

    def _gradient(self, action: Action, y: Tensor, arrived: dict[Action, Tensor]) -> Tensor | None:
        if action.chunk == self.num_chunks - 1:
            return None
        source = self.stages[action.chunk + 1]
        made = action._replace(chunk=action.chunk + 1)
        if source == self.axis.rank:
            return arrived.pop(made)
        return collectives.start_receive(torch.empty_like(y), self.axis, source, self._tag(made)).wait()

    def _pass_on(self, made: Action, chunk: int, x: Tensor, tokens: Tensor, arrived: dict[Action, Tensor]) -> None:
        """What `made` made, to a neighbouring chunk."""
        to = self.stages[chunk]
        if to == self.axis.rank:
            arrived[made] = x
            return
        told = (*tokens.shape, -1 - to)
        if made.kind == "F" and told not in self._known:
            self._known[told] = tuple(x.shape), x.dtype
            header = torch.tensor([DTYPES.index(x.dtype), x.dim(), *x.shape, *[0] * (MAX_DIM - x.dim())])
            header = header.to(tokens.device)
            self._sending.append(collectives.start_send(header, self.axis, to, self._tag(made) + 1))
        self._sending = [pending for pending in self._sending if not pending.done()]
        self._sending.append(collectives.start_send(x, self.axis, to, self._tag(made)))

    def _read_header(self, made: Action, source: int, device: torch.device) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what follows: the first time that tokens of a shape come this way."""
        out = torch.empty(2 + MAX_DIM, dtype=torch.int64, device=device)
        dtype, dim, *shape = collectives.start_receive(out, self.axis, source, self._tag(made) + 1).wait().tolist()
        return tuple(shape[:dim]), DTYPES[dtype]

    def _tag(self, made: Action) -> int:
        """Gloo tells messages apart by it."""
        return 2 * (2 * (made.micro * self.num_chunks + made.chunk) + (made.kind == "B"))
