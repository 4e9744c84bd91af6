"""A product with a weight, whose gradient can be put off, or added right where it is summed.

Autograd writes each weight's gradient to memory of its own, and reads it to add it to others. A matrix product can add
to what lies there: a sum over microbatches, in the bucket that ranks reduce, costs no more than the products.
Source     Megatron-LM's gradient accumulation fusion
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmsys.ops import linear
from llmsys.ops.deferred import Later, active


@dataclass(frozen=True, eq=False)
class Sink:
    """Where the gradient of `weight` is summed. Autograd then finds none, but its node runs. A copy of it is None.

    add        of dy and x, their rows together: adds dyᵀ·x
    add_rows   of dy and ids: adds to row ids[i] the row dy[i], for every i
    is_open    whether that is wanted now: of a backward that gives gradients to somebody else it is not
    adds_up    whether most of what is added now comes to something, and does not only lie where there was nothing
    """

    weight: nn.Parameter
    add: Callable[[Tensor, Tensor], None]
    add_rows: Callable[[Tensor, Tensor], None]
    is_open: Callable[[], bool]
    adds_up: Callable[[], bool]

    def attach(self) -> None:
        self.weight.llmsys_sink = self  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple:
        return type(None), ()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as `llmsys.linear`, which `llmsys.ops.deferred` knows."""
    if torch.is_autocast_enabled(x.device.type):  # which casts the weight: no gradient of it can wait
        return F.linear(x, weight, bias)
    sink = _sink_of(weight)
    if sink is None or not sink.adds_up():
        return linear(x, weight, bias)
    return _Product.apply(x, weight, bias, sink, active())


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of the weight, as `torch.nn.functional.embedding`."""
    # On a GPU adding rows of the same place to it has no order, and so another result each time.
    sink = _sink_of(weight) if weight.is_cpu else None
    return F.embedding(ids, weight) if sink is None else _LookUp.apply(ids, weight, sink)


def _sink_of(weight: Any) -> Sink | None:
    """If autograd records, and nobody but the sink would see the gradient."""
    sink = getattr(weight, "llmsys_sink", None)
    if sink is None or not (sink.is_open() and torch.is_grad_enabled() and weight.requires_grad):
        return None
    watched = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return None if watched or torch.compiler.is_compiling() else sink


class _Product(torch.autograd.Function):
    """Its weight's gradient goes to the sink, at once or later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink, later: Later | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.later = sink, later
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needs_dx, _, needs_dbias, *_ = ctx.needs_input_grad
        sink, dy_rows, x_rows = ctx.sink, dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.later is None:
            sink.add(dy_rows, x_rows)
        else:
            ctx.later.put_off((sink.weight,), lambda: (sink.add(dy_rows, x_rows),))
        dx = linear(dy, weight.t()) if needs_dx else None
        dbias = dy_rows.sum(0) if needs_dbias else None
        return dx, None, dbias, None, None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sink = sink
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        (ids,) = ctx.saved_tensors
        ctx.sink.add_rows(dy.flatten(0, -2), ids.flatten())
        return None, None, None
