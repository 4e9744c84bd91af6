"""The loss of a causal language model: head and cross entropy become `linear_cross_entropy`, which keeps no logits.

While labels are given, the head returns `Logits`, and the loss function reads from them what the logits are made of.
Whatever else reads them gets the head's own numbers. Under torch.compile the model's own code is compiled.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.integrations.transformers.logits import Logits
from llmsys.ops.linear_cross_entropy import linear_cross_entropy

_awaited: ContextVar[nn.Module | None] = ContextVar("llmsys_awaited_head", default=None)


class Head(Swapped):
    """A head that returns `Logits` to the model that awaits them."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or _awaited.get() is not self or not _may_wait(self, x):
            return super().forward(x)
        tensors: tuple[Any, ...] = (x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
        return Logits.of(*tensors)


class CausalLM(Swapped):
    """A model whose forward calls `self.loss_function` with what its head returned."""

    known_loss: Callable  # the function that was tried: another is left to itself

    @classmethod
    def members(cls, original: Any, attributes: dict[str, Any]) -> dict[str, Any]:
        forward, stored = original.forward, original.loss_function
        known, signature = attributes["known_loss"], inspect.signature(forward)

        @functools.wraps(forward)
        def awaiting(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or _labels(signature, self, args, kwargs) is None:
                return forward(self, *args, **kwargs)
            before = _awaited.set(self.get_output_embeddings())
            try:
                return forward(self, *args, **kwargs)
            finally:
                _awaited.reset(before)

        def loss_function(self: Any) -> Callable:
            own = stored.fget(self)
            return own if torch.compiler.is_compiling() or own is not known else functools.partial(loss, own)

        return {"forward": awaiting, "loss_function": property(loss_function, stored.fset, stored.fdel)}


def loss(
    own: Callable,
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """What `own` returns for these arguments, without logits where they are not made yet."""
    softcap = logits.softcap() if isinstance(logits, Logits) and not logits.made else None
    if softcap is None or logits.shape[-1] != vocab_size or logits.numel() == 0:
        shifted: Any = {} if shift_labels is None else {"shift_labels": shift_labels}
        return own(logits, labels, vocab_size, num_items_in_batch, ignore_index, **shifted, **more)
    assert isinstance(logits, Logits)
    target = shift_labels
    if target is None:
        assert labels is not None
        target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = target.to(logits.device).reshape(logits.shape[:-1])
    found = linear_cross_entropy(
        *(logits.input, logits.weight, target, logits.bias),
        ignore_index=ignore_index,
        softcap=softcap,
        num_items=num_items_in_batch,
    )
    return found.float()


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for `module`, why it is left, or None if it is no model with a head and a loss."""
    head_of = getattr(module, "get_output_embeddings", None)
    if not callable(head_of) or (head := head_of()) is None or not callable(getattr(module, "loss_function", None)):
        return None
    if not isinstance(getattr(type(module), "loss_function", None), property):
        return "its loss_function is no property, where another could be put"
    own: Any = module.loss_function
    forward: Any = inspect.unwrap(type(module).forward)
    if "labels" not in inspect.signature(forward).parameters:
        return None
    if "loss_function" not in forward.__code__.co_names:
        return "its forward does not call its loss_function"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__} of {type(head).__module__}, expected torch.nn.Linear"
    if "forward" in vars(head):
        return "the forward of its head was replaced on the instance"
    if reason := probe.why_not([head.weight]):
        return reason
    if not all(_computes(own, head.weight.device, **options) for options in _options(head.weight.device)):
        return "its loss is no cross entropy of each token's logits with the next token"
    return Swap("linear_cross_entropy", CausalLM, {"known_loss": own}, partners=((head, Swap("", Head)),))


def _options(device: torch.device) -> list[dict[str, Any]]:
    """Every way in which a loss function is called."""
    shifted = torch.tensor([[1, 2, 0, 3, -100], [4, 4, 4, 4, 4]], device=device)
    return [
        {},
        {"num_items_in_batch": torch.tensor(3, device=device)},
        {"num_items_in_batch": 3, "ignore_index": 2},
        {"shift_labels": shifted},
    ]


def _computes(own: Callable, device: torch.device, **options: Any) -> bool:
    """Whether `own` is the cross entropy of shifted labels, on logits (2, 5, 7)."""
    logits = probe.numbers(2, 5, 7, seed=0, dtype=torch.float32, device=device)
    labels = torch.tensor([[0, 2, -100, 6, 1], [3, 2, 5, -100, 4]], device=device)
    ignored = options.get("ignore_index", -100)
    labels[labels == -100] = ignored

    def formula(logits: Tensor) -> Tensor:
        target = options.get("shift_labels", F.pad(labels, (0, 1), value=ignored)[:, 1:])
        items = options.get("num_items_in_batch")
        reduction = "mean" if items is None else "sum"
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=ignored, reduction=reduction)
        return total if items is None else total / items

    given = probe.outcome(own, logits=logits, labels=labels.clone(), vocab_size=7, **options)
    return probe.agrees(given, formula(logits.double()), formula(logits), roundings=2)


def _labels(signature: inspect.Signature, model: nn.Module, args: tuple, kwargs: dict) -> object:
    """The labels that a call gives."""
    if args and "labels" not in kwargs:
        try:
            return signature.bind(model, *args, **kwargs).arguments.get("labels")
        except TypeError:  # a call that does not fit: the model's own forward says so
            return None
    return kwargs.get("labels")


def _may_wait(head: Head, x: Tensor) -> bool:
    """Whether nothing but the loss needs this head's result now, and its weight stays where it is until then.

    A hook sees the result; and sharding puts weights in place by hooks, and takes them away after the forward.
    """
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    plain = type(head.weight) is nn.Parameter and type(x) is Tensor
    autocast = torch.is_autocast_enabled(x.device.type)
    same = x.dtype is head.weight.dtype and x.dtype in probe.FLOATS
    return bool(not hooked and plain and (same or autocast) and not torch._C._are_functorch_transforms_active())
