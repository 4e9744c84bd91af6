"""A product with a weight, and rows of one, whose gradients can be put off, or added right where they are summed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsys.ops import linear
from llmsys.ops.sink import Sink, sink_of


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    if torch.is_autocast_enabled(x.device.type):  # which casts the weight: no gradient of it can wait
        return F.linear(x, weight, bias)
    return linear(x, weight, bias)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of the weight, as `torch.nn.functional.embedding`."""
    # On a GPU adding rows of the same place to it has no order, and so another result each time.
    sink = sink_of(weight) if weight.is_cpu else None
    return F.embedding(ids, weight) if sink is None else _LookUp.apply(ids, weight, sink)


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
