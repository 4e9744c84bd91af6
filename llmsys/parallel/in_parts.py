"""Parameters whose numbers are elsewhere: who asks for them gets an error, where PyTorch would read freed memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

# What needs no numbers, and, of properties, what would show them.
METHODS = frozenset(
    (
        *("__hash__", "dim", "ndimension", "nelement", "numel", "size", "stride", "storage_offset", "is_contiguous"),
        *("element_size", "get_device", "is_complex", "is_floating_point", "requires_grad_", "untyped_storage"),
        *("new_empty", "new_full", "new_ones", "new_zeros", "empty_like", "full_like", "ones_like", "zeros_like"),
        *("register_hook", "register_post_accumulate_grad_hook", "backward", "grad"),
    )
)
VIEWS = frozenset(("H", "T", "data", "imag", "mH", "mT", "real"))


class InParts(nn.Parameter):
    """What a parameter is meanwhile."""

    def __repr__(self, *, tensor_contents: None = None) -> str:  # type: ignore[override]
        return f"a parameter of shape {tuple(self.shape)} that is in parts on many ranks"

    __format__ = object.__format__

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if _needs_no_numbers(function):
                return function(*args, **(kwargs or {}))
            shapes = [str(tuple(x.shape)) for x in tree_leaves((args, kwargs)) if isinstance(x, InParts)]
        name = torch.overrides.resolve_name(function) or function.__name__
        raise RuntimeError(
            f"llmsys.parallel: {name} of a parameter of shape {' and '.join(dict.fromkeys(shapes))}, which is in parts "
            "on many ranks; expected it in a call of its unit (for `parallelize`, a block, or the model itself) or "
            "within `with zero.whole():`"
        )


def _needs_no_numbers(function: Callable[..., Any]) -> bool:
    name = function.__name__
    if name in ("__get__", "__set__"):
        return function.__self__.__name__ not in VIEWS  # type: ignore[attr-defined]
    return name in METHODS


def take_apart(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if type(parameter) is nn.Parameter:  # others have a behaviour of their own
            parameter.__class__ = InParts


def make_whole(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if type(parameter) is InParts:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
