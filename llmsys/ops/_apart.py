"""Weights whose gradients do not take autograd's way: they wait for `Later`, or a sink takes them."""

from __future__ import annotations

from operator import or_
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from llmsys.ops._impl import Impl
from llmsys.ops.deferred import Later, active
from llmsys.ops.sink import Product, Sink, made, sink_of

if TYPE_CHECKING:
    from llmsys.ops._op import Op


class Apart(NamedTuple):
    """Weights of a call, by index: some have a sink, and all wait where there is a `later`."""

    weights: dict[int, Any]
    sinks: dict[int, Sink]
    later: Later | None

    def backward(self, op: Op, ctx: Any, grads: tuple, implementation: Impl, needed: tuple[bool, ...]) -> tuple:
        """The gradients for autograd."""
        if all(grad is None for grad in grads):
            return (None,) * len(needed)
        assert implementation.backward is not None
        late = tuple(i in self.weights for i in range(len(needed)))
        if implementation.backward_in_parts is not None:
            both = tuple(map(or_, needed, late))
            results, finish = implementation.backward_in_parts(*op.arguments(ctx, ctx.saved_tensors, grads, both))
        elif self.later is not None:
            results = implementation.backward(*op.arguments(ctx, ctx.saved_tensors, grads, needed))
            args = op.arguments(ctx, ctx.saved_tensors, grads, late)
            finish = lambda: implementation.backward(*args)  # type: ignore[misc] # noqa: E731
        else:
            return op.backward(ctx, grads, implementation.backward, needed)

        def gradients() -> list[Tensor | None]:
            """Those of the weights, made now."""
            made = op.gradients(finish(), grads, late)
            return [_taken(made[i], self.sinks.get(i)) for i in self.weights]

        others = op.gradients(results, grads, needed)
        if self.later is not None:
            self.later.put_off(tuple(self.weights.values()), gradients)
            return others
        now = dict(zip(self.weights, gradients(), strict=True))
        return tuple(now.get(i, gradient) for i, gradient in enumerate(others))


def set_apart(op: Op, args: tuple) -> tuple[tuple, Apart | None]:
    """The arguments, with weights that wait cut out of the graph, and what is to be done for the weights."""
    later = active()
    sinks = {i: sink for i in op.deferrable if (sink := sink_of(args[i])) is not None and sink.adds_up()}
    if later is None and not sinks:
        return args, None
    weights = {i: args[i] for i in op.deferrable if args[i].requires_grad}
    if later is not None and weights and all(weight.is_leaf for weight in weights.values()):
        others = [args[i] for i in op.tensors if i not in weights and args[i] is not None]
        if any(tensor.requires_grad for tensor in others):  # else nothing would call for the backward
            args = tuple(arg.detach() if i in weights else arg for i, arg in enumerate(args))
            return args, Apart(weights, sinks, later)
    return args, Apart(weights, sinks, None) if sinks else None


def _taken(gradient: Tensor | Product, sink: Sink | None) -> Tensor | None:
    """What is left of it for autograd."""
    if sink is None or not isinstance(gradient, Product):
        return made(gradient)
    sink.add(gradient)
    return None
