"""Gradients of weights made after those of inputs, as the zero-bubble schedules of a pipeline need it.

    with deferring() as later:
        y = model(x)
    y.backward(dy)      # gradients of x, and of what is not put off
    later.finish()      # those of the weights of matrix products: each is added to its `.grad`, whose hooks run

Put off are the weights that an op names as deferrable, where all are leaves and the op's input has a gradient too.
What a weight's gradient is made from is kept until then: what the op multiplies, and the gradient that arrived.
Source     Qi et al. 2023, arXiv:2401.10241, section 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_active: ContextVar[Later | None] = ContextVar("llmsys_deferring", default=None)


class Later:
    """What the backward of one graph has put off."""

    def __init__(self) -> None:
        self._put_off: list[tuple[Sequence[Tensor], Callable[[], Sequence[Tensor | None]]]] = []

    def __len__(self) -> int:
        return len(self._put_off)

    def put_off(self, leaves: Sequence[Tensor], make: Callable[[], Sequence[Tensor | None]]) -> None:
        """`make()` gives the gradients of `leaves`, or None where it did something else with one."""
        self._put_off.append((leaves, make))

    def finish(self) -> None:
        """Make all that was put off, in one backward, which frees what each was made from as it goes."""
        roots = [_Late.apply(make, *leaves) for leaves, make in self._put_off]
        self._put_off.clear()
        torch.autograd.backward(roots, roots)


class _Late(torch.autograd.Function):
    """Nothing, of which the gradient is what `make` gives."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Sequence[Tensor | None]], *leaves: Tensor) -> Tensor:
        ctx.make = make
        return leaves[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, nothing: Tensor) -> tuple:
        make, ctx.make = ctx.make, None
        return None, *make()


@contextmanager
def deferring() -> Iterator[Later]:
    """Ops called meanwhile put off the gradients of their weights, when their backward runs."""
    later = Later()
    token = _active.set(later)
    try:
        yield later
    finally:
        _active.reset(token)


def active() -> Later | None:
    return _active.get()
