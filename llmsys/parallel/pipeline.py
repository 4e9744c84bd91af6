"""Pipeline parallelism: each stage holds some runs of a model's blocks, and executes its list of actions.

A model that can be cut says what its parts are: `enter(tokens)` gives what the first block is given, `run(x, blocks,
sequence_length)` goes through some blocks, `leave(x, targets)` gives the loss; `ends()` names the children that enter
and leave use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from llmsys.ops.deferred import Later, deferring
from llmsys.parallel import collectives
from llmsys.parallel.balance import balanced
from llmsys.parallel.channels import Channels, Form
from llmsys.parallel.mesh import Axis
from llmsys.parallel.product import look_up, product
from llmsys.parallel.schedule import SCHEDULES, Action, orders


@dataclass
class _Graph:
    """Of a chunk and a microbatch, until its backward: what came in, and where the gradient of what went out goes."""

    x: Tensor | None
    y: GradientEdge | None
    form: Form  # of y, which itself is kept no longer than it is sent
    later: Later


class Pipeline:
    """This rank's stage of `model`, of which it keeps no more, under the names that it has in the whole.

        pipeline = Pipeline(model, "blocks", mesh.pp, schedule="1f1b")
        loss = pipeline.step(microbatches)      # forward and backward of all; gradients as if of their mean loss

    blocks     the name of the model's list of blocks
    costs      of the blocks in order, in any unit: runs are cut so that the largest is least; alike by default
    names      after this: of the blocks that this stage holds
    shared     after this: parameters that another stage holds too, by name, and that stage: the gradients of the two
               must be summed, once all microbatches and data parallel ranks are

    Traffic    of a microbatch, its activations from each chunk to the next on another stage, and as much back
    Where the schedule has gradients of weights wait (W), they are those of `torch.nn.Linear`, which here runs as
    `llmsys.linear`, and of llmsys's `linear` and `mlp`; of other layers B makes both.
    Errors     ValueError for a schedule that is not one, more chunks than blocks, blocks that are no list of the model,
               or another number of costs
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
        self.model, self.axis, self.schedule = model, axis, schedule
        self.chunks_per_stage = chunks_per_stage
        self.num_chunks = 1 + max(
            action.chunk for row in orders(schedule, axis.size, 1, chunks_per_stage) for action in row
        )
        self.split = SCHEDULES[schedule].split
        self.stages = [SCHEDULES[schedule].stage_of(chunk, axis.size) for chunk in range(self.num_chunks)]
        self.channels = Channels(axis, self.stages)
        every = _blocks(model, blocks)
        costs = [1.0] * len(every) if costs is None else costs
        if len(costs) != len(every):
            raise ValueError(
                f"llmsys.parallel.Pipeline: {len(costs)} costs of {len(every)} blocks, expected one for each"
            )
        runs = balanced(costs, self.num_chunks)
        own = {chunk: runs[chunk] for chunk in range(self.num_chunks) if self.stages[chunk] == axis.rank}
        self.blocks: dict[int, list[nn.Module]] = {chunk: [every[i] for i in run] for chunk, run in own.items()}
        setattr(model, blocks, nn.ModuleDict({str(i): every[i] for run in own.values() for i in run}))
        self.names = [f"{blocks}.{i}" for run in own.values() for i in run]
        self.shared = self._keep_ends(0 in own, self.num_chunks - 1 in own)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.forward = partial(_linear, module)  # type: ignore[method-assign]
            if type(module) is nn.Embedding and _is_plain(module):
                module.forward = partial(_embedding, module)  # type: ignore[method-assign]

    def _keep_ends(self, first: bool, last: bool) -> dict[str, int]:
        enter, leave = self.model.ends()
        for name in {*enter, *leave}:
            if not (first and name in enter or last and name in leave):
                setattr(self.model, name, None)
        if first == last:
            return {}
        return {
            f"{name}.{parameter}": self.stages[-1 if first else 0]
            for name in set(enter) & set(leave)
            for parameter, _ in self.model.get_submodule(name).named_parameters()
        }

    def step(
        self,
        micros: Sequence[tuple[Tensor, Tensor]],
        *,
        before: Callable[[int], None] = lambda micro: None,
        accumulating: Callable[[], AbstractContextManager[Any]] = nullcontext,
        holding: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Mean loss of the microbatches (tokens, targets), which every stage is given, on every stage.

        Gradients are added to what is there. Every backward but this stage's last one runs under `accumulating()`;
        where it is split, its first part, B, under `holding()`. `before(micro)` is called before each forward.
        """
        actions = orders(self.schedule, self.axis.size, len(micros), self.chunks_per_stage)[self.axis.rank]
        self.channels.open(micros[0][0].device)
        ends = "W" if self.split else "B"
        left = sum(action.kind == ends for action in actions)
        graphs: dict[Action, _Graph] = {}  # by the forward
        losses: list[Tensor] = []
        for index, action in enumerate(actions):
            for soon in actions[index : index + 2]:
                self._expect(soon, micros, graphs)
            left -= action.kind == ends
            of, micro = action._replace(kind="F"), micros[action.micro]
            if action.kind == "F":
                before(action.micro)
                graphs[of] = self._forward(action, micro, 1 / len(micros), losses)
                continue
            graph = graphs[of] if self.split and action.kind == "B" else graphs.pop(of)
            with holding() if action.kind != ends else accumulating() if left else nullcontext():
                if action.kind == "B":
                    self._backward(action, micro[0], graph)
                else:
                    graph.later.finish()
        self.channels.finish()
        return self._mean(losses, micros)

    @torch.no_grad()
    def evaluate(self, micros: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The loss that `step` gives, without gradients."""
        actions = orders(self.schedule, self.axis.size, len(micros), self.chunks_per_stage)[self.axis.rank]
        self.channels.open(micros[0][0].device)
        losses: list[Tensor] = []
        for action in actions:
            if action.kind != "F":
                continue
            tokens, targets = micros[action.micro]
            if action.chunk == 0:
                x = self.model.enter(tokens)
            else:
                x = self.channels.receive(action._replace(chunk=action.chunk - 1), tokens)
            y = self.model.run(x, self.blocks[action.chunk], tokens.shape[-1])
            if action.chunk == self.num_chunks - 1:
                losses.append(self.model.leave(y, targets))
            else:
                self.channels.send(action, y, tokens)
        self.channels.finish()
        return self._mean(losses, micros)

    def _forward(self, action: Action, micro: tuple[Tensor, Tensor], weight: float, losses: list[Tensor]) -> _Graph:
        tokens, targets = micro
        if action.chunk == 0:
            x = self.model.enter(tokens)
        else:
            x = self.channels.receive(action._replace(chunk=action.chunk - 1), tokens).requires_grad_()
        with deferring() if self.split else nullcontext(Later()) as later:
            y = self.model.run(x, self.blocks[action.chunk], tokens.shape[-1])
            if action.chunk == self.num_chunks - 1:
                y = self.model.leave(y, targets)
                losses.append(y.detach())
                y = y * weight
        if action.chunk < self.num_chunks - 1:
            self.channels.send(action, y.detach(), tokens)
        return _Graph(x, get_gradient_edge(y), Form(y.shape, y.dtype), later)

    def _backward(self, action: Action, tokens: Tensor, graph: _Graph) -> None:
        dy = None
        if action.chunk < self.num_chunks - 1:
            dy = self.channels.receive(action._replace(chunk=action.chunk + 1), tokens, graph.form)
        assert graph.y is not None
        torch.autograd.backward(graph.y, dy)
        if action.chunk > 0:
            assert graph.x is not None
            assert graph.x.grad is not None
            self.channels.send(action, graph.x.grad, tokens)
        graph.x = graph.y = None

    def _expect(self, action: Action, micros: Sequence[tuple[Tensor, Tensor]], graphs: dict[Action, _Graph]) -> None:
        """Let come what `action` needs."""
        tokens, of = micros[action.micro][0], action._replace(kind="F")
        if action.kind == "F" and action.chunk > 0:
            self.channels.expect(action._replace(chunk=action.chunk - 1), tokens)
        elif action.kind == "B" and action.chunk < self.num_chunks - 1 and of in graphs:
            self.channels.expect(action._replace(chunk=action.chunk + 1), tokens, graphs[of].form)

    def _mean(self, losses: list[Tensor], micros: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        mean = torch.stack(losses).double().mean() if losses else torch.zeros((), dtype=torch.float64)
        return collectives.broadcast(mean.to(micros[0][0].device), self.axis, self.stages[-1])


def _blocks(model: nn.Module, name: str) -> list[nn.Module]:
    lists = [name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    if name not in lists:
        raise ValueError(
            f"llmsys.parallel.Pipeline: blocks {name!r}, expected a list of modules of {type(model).__name__}, "
            f"{' or '.join(lists) or 'which has none'}"
        )
    return list(model.get_submodule(name))  # type: ignore[call-overload]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """PyTorch's linear layer by a product whose weight's gradient can be put off."""
    return product(x, module.weight, module.bias)


def _is_plain(module: nn.Embedding) -> bool:
    return module.padding_idx is None and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    return look_up(ids, module.weight)
