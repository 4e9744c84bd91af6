"""Gradients of weights, added right where they are summed.

Autograd writes each weight's gradient to memory of its own, and reads it to add it to others. A matrix product can add
to what lies there: a sum over microbatches, in the bucket that ranks reduce, costs no more than the products.
Source     Megatron-LM's gradient accumulation fusion
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.ops._matmul import Matmul


@dataclass(frozen=True)
class Product:
    """a · b, not made before it is known where it goes."""

    matmul: Matmul
    a: Tensor
    b: Tensor

    def make(self) -> Tensor:
        return self.matmul(self.a, self.b)

    def add_to(self, out: Tensor, scale: float) -> None:
        self.matmul(self.a, self.b, out, add=True, scale=scale)


def made(gradient: Tensor | Product) -> Tensor:
    return gradient.make() if isinstance(gradient, Product) else gradient


@dataclass(frozen=True, eq=False)
class Sink:
    """Where the gradient of `weight` is summed. Autograd then finds none, but its node runs. A copy of it is None.

    add        a product that is of the gradient
    add_rows   of dy and ids: adds to row ids[i] the row dy[i], for every i
    is_open    whether that is wanted now: of a backward that gives gradients to somebody else it is not
    adds_up    whether most of what is added now comes to something, and does not only lie where there was nothing
    """

    weight: nn.Parameter
    add: Callable[[Product], None]
    add_rows: Callable[[Tensor, Tensor], None]
    is_open: Callable[[], bool]
    adds_up: Callable[[], bool]

    def attach(self) -> None:
        self.weight.llmsys_sink = self  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple:
        return type(None), ()


def sink_of(weight: Any) -> Sink | None:
    """If autograd records, and nobody but the sink would see the gradient."""
    sink = getattr(weight, "llmsys_sink", None)
    if sink is None or not (sink.is_open() and torch.is_grad_enabled() and weight.requires_grad):
        return None
    watched = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return None if watched or torch.compiler.is_compiling() else sink
