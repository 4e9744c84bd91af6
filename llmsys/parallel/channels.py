"""What the stages of a pipeline send each other: activations from chunk to chunk, and gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llmsys.parallel import collectives
from llmsys.parallel.collectives import Pending
from llmsys.parallel.groups import group_of
from llmsys.parallel.mesh import Axis
from llmsys.parallel.schedule import Action

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 7  # of what passes between stages


class Form(NamedTuple):
    """What there is to know of a tensor before it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Channels:
    """This stage's messages, each named by the action that makes it; between chunks of one stage nothing is sent.

    stages     of each chunk, in order

    Activations and gradients, up the stages and down, have groups of their own: where a send waits for its receiver,
    as NCCL's do, it holds up none of another direction.
    """

    def __init__(self, axis: Axis, stages: Sequence[int]):
        self.axis, self.stages = axis, stages
        self._opened = False
        self._known: dict[tuple[int, ...], Form] = {}  # activations, by tokens' shape
        self._told: set[tuple[int, ...]] = set()
        self._here: dict[Action, Tensor] = {}
        self._receiving: dict[Action, Pending] = {}
        self._sending: list[Pending] = []

    def open(self, device: torch.device) -> None:
        """Make the groups, in the same order on all stages, before the first message; on a GPU, let neighbours connect.

        Over NCCL two ranks connect at their first message, where each stops until the other comes. One that waits for a
        message of the other meanwhile, or loads a kernel while a kernel of its own waits for one, never comes.
        """
        if self._opened:
            return
        passages = {pair for pair in pairwise(self.stages) if pair[0] != pair[1]}
        ways = sorted({("F", *pair) for pair in passages} | {("B", *pair[::-1]) for pair in passages})
        for way in ways:
            group_of(self._channel(*way))
        for kind, sender, receiver in ways if device.type == "cuda" else ():
            channel, word = self._channel(kind, sender, receiver), torch.zeros(1, device=device)
            if self.axis.rank == sender:
                collectives.start_send(word, channel, receiver).wait()
            elif self.axis.rank == receiver:
                collectives.start_receive(word, channel, sender).wait()
        self._opened = True

    def send(self, made: Action, x: Tensor, tokens: Tensor) -> None:
        """What `made` made, of microbatch `tokens`, to the neighbouring chunk."""
        to = self.stages[made.chunk + (1 if made.kind == "F" else -1)]
        if to == self.axis.rank:
            self._here[made] = x
            return
        channel = self._channel(made.kind, self.axis.rank, to)
        if made.kind == "F" and (to, *tokens.shape) not in self._told:
            self._told.add((to, *tokens.shape))
            header = torch.tensor([DTYPES.index(x.dtype), x.dim(), *x.shape, *[0] * (MAX_DIM - x.dim())])
            self._sending.append(collectives.start_send(header.to(tokens.device), channel, to, self._tag(made) + 1))
        self._sending = [pending for pending in self._sending if not pending.done()]
        self._sending.append(collectives.start_send(x, channel, to, self._tag(made)))

    def expect(self, made: Action, tokens: Tensor, form: Form | None = None) -> None:
        """Let what `made` makes come while other work goes on, if its form is known, or was told before."""
        if form is not None or tuple(tokens.shape) in self._known:
            self._start(made, tokens, form)

    def receive(self, made: Action, tokens: Tensor, form: Form | None = None) -> Tensor:
        """What `made` made, once it is here."""
        if self.stages[made.chunk] == self.axis.rank:
            return self._here.pop(made)
        self._start(made, tokens, form)
        return self._receiving.pop(made).wait()

    def finish(self) -> None:
        """Wait until all that was sent is received."""
        for pending in self._sending:
            pending.wait()
        self._sending.clear()

    def _start(self, made: Action, tokens: Tensor, form: Form | None) -> None:
        source = self.stages[made.chunk]
        if source == self.axis.rank or made in self._receiving:
            return
        channel = self._channel(made.kind, source, self.axis.rank)
        if form is None:
            if tuple(tokens.shape) not in self._known:
                self._known[tuple(tokens.shape)] = self._read_header(made, channel, tokens.device)
            form = self._known[tuple(tokens.shape)]
        out = torch.empty(form.shape, dtype=form.dtype, device=tokens.device)
        self._receiving[made] = collectives.start_receive(out, channel, source, self._tag(made))

    def _read_header(self, made: Action, channel: Axis, device: torch.device) -> Form:
        """Of what follows: the first time that tokens of a shape come this way."""
        source = self.stages[made.chunk]
        out = torch.empty(2 + MAX_DIM, dtype=torch.int64, device=device)
        dtype, dim, *shape = collectives.start_receive(out, channel, source, self._tag(made) + 1).wait().tolist()
        return Form(tuple(shape[:dim]), DTYPES[dtype])

    def _channel(self, kind: str, sender: int, receiver: int) -> Axis:
        return replace(self.axis, channel=f"{kind} {'down' if receiver > sender else 'up'}")

    def _tag(self, made: Action) -> int:
        """Gloo tells messages apart by it."""
        return 2 * (made.micro * len(self.stages) + made.chunk)
