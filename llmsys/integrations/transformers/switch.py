"""Attention: a model's layers ask its configuration which implementation they run, and so do the masks.

The modules of this model are given a `View` of the configuration, which says "llmsys" there and else is the
configuration itself; it stays as it is, and so do other models that share it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.attention import OP, reference
from llmsys.ops.attention.arguments import MAX_HEAD_DIM

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
KNOWN = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "scaling",
    "dropout",
    "kwargs",
    "softcap",
    "position_bias",
}


class View:
    """A configuration's attributes, one and the same, but for the attention that it names.

    It derives from the configuration's class too; `base` is the configuration.
    """

    __slots__ = ()
    base: Any
    _attn_implementation_internal: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        return view, (self.base,)


@functools.cache
def _view_class(cls: type) -> type:
    # Slots of the class come before the attributes of the instance, which are the configuration's.
    slots = ("base", "_attn_implementation_internal")
    return type(cls.__name__, (View, cls), {"__slots__": slots, "__module__": cls.__module__})


def view(config: Any) -> View:
    from llmsys.integrations.transformers import attention  # also where a pickled model is read: it registers the name

    made: Any = object.__new__(_view_class(type(config)))  # type: ignore[arg-type]
    object.__setattr__(made, "__dict__", vars(config))
    object.__setattr__(made, "base", config)
    object.__setattr__(made, "_attn_implementation_internal", attention.NAME)
    return made


@dataclass(frozen=True)
class Switch(Swap):
    """The `holders` of a configuration see a view of it."""

    holders: tuple[nn.Module, ...] = ()

    def make(self, module: nn.Module) -> None:
        config = vars(module)["config"]
        if not isinstance(config, View):  # else another attention of the model came before
            seen = view(config)
            for holder in self.holders:
                vars(holder)["config"] = seen


def undo(module: nn.Module) -> None:
    """Give `module` the configuration back that it had before."""
    config = vars(module).get("config")
    if isinstance(config, View):
        vars(module)["config"] = config.base


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The switch for `module`, why it is left, or None if it is no attention that asks transformers' interface."""
    eager = _eager(type(module).forward)
    config = vars(module).get("config")
    if eager is None or config is None:
        return None
    holders = tuple(other for other in model.modules() if vars(other).get("config") is config)
    default = "sdpa" if any(getattr(other, "_supports_sdpa", False) for other in holders) else "eager"
    if (asked := getattr(config, "_attn_implementation", None)) != default:
        return f'its configuration asks for "{asked}", not for the default, "{default}"'
    if getattr(config, "output_attentions", False):
        return "its configuration asks for attention weights, which are never made"
    if (head_dim := getattr(module, "head_dim", 0)) > MAX_HEAD_DIM:
        return f"its head dim is {head_dim}, expected at most {MAX_HEAD_DIM}"
    if missing := _no_kernel(module, model):
        return missing
    if unknown := set(inspect.signature(eager).parameters) - KNOWN:
        return f"its own attention takes {', '.join(sorted(unknown))}"
    if not _computes(module, eager):
        return "its own attention is no attention that the op computes"
    together = tuple(other for other in holders if _eager(type(other).forward) is not None)
    return Switch("attention", Swapped, together=together, holders=holders)


def _no_kernel(module: nn.Module, model: nn.Module) -> str | None:
    """Why no kernel could run `module`'s attention, by its own weights or, where none of those are floats, the model's;
    None if one can. The reference, which keeps every score, would be no gain."""
    weights = itertools.chain(module.parameters(), model.parameters())
    weight = next((weight for weight in weights if weight.dtype in probe.FLOATS), None)
    if weight is None:
        return f"neither it nor the model has a weight in one of {', '.join(map(str, probe.FLOATS))}"
    if weight.is_meta:
        return probe.why_not([weight])
    x = torch.empty(1, 1, 1, getattr(module, "head_dim", 8), dtype=weight.dtype, device=weight.device)
    reasons = OP.explain(x, x, x).reasons
    kernels = {name: reasons[name] for name in itertools.takewhile(lambda name: name != "reference", reasons)}
    if None in kernels.values():
        return None
    told = "; ".join(f"{name}: {reason}" for name, reason in kernels.items())
    return f"no kernel of ours computes attention in {weight.dtype} on {weight.device.type} ({told})"


def _eager(forward: Callable) -> Callable | None:
    """The function that `forward` runs where no other attention is asked for, if it asks."""
    code: Any = inspect.unwrap(forward)
    names = getattr(getattr(code, "__code__", None), "co_names", ())
    if INTERFACE not in names:
        return None
    functions = (code.__globals__.get(name) for name in names if "eager" in name)
    return next((function for function in functions if inspect.isfunction(function)), None)


def _computes(module: nn.Module, eager: Any) -> bool:
    """Whether `eager` is attention: with softcap and bias where it takes them, and sinks where the module has them."""
    takes = inspect.signature(eager).parameters
    heads, groups = 4, getattr(module, "num_key_value_groups", 1)
    sinks = {}
    if isinstance(own := getattr(module, "sinks", None), Tensor):
        heads, sinks = len(own), {"sinks": own}
    heads -= heads % groups
    cpu = torch.device("cpu")
    q, k, v, drawn, bias, sink = (
        probe.numbers(*shape, seed=seed, dtype=torch.float32, device=cpu)
        for seed, shape in enumerate(
            [
                (2, heads, 3, 8),
                (2, heads // groups, 5, 8),
                (2, heads // groups, 5, 8),
                (2, 1, 3, 5),
                (1, heads, 3, 5),
                (heads,),
            ]
        )
    )
    mask = torch.where(drawn < 0.7, 0.0, torch.finfo(torch.float32).min)
    twin = probe.twin(module, dict.fromkeys(sinks, sink), {})

    def formula(softcap: float, *tensors: Tensor) -> Tensor:
        q, k, v, mask, bias, sink = tensors
        added = (mask + bias if "position_bias" in takes else mask).expand(2, heads, -1, -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = (None, None, None, None, 64, -1, -1, 0.4, softcap, 0.0, 0)
        return reference.forward(q, k, v, added, sink if sinks else None, *options)[0]

    for softcap in (0.0, 0.7) if "softcap" in takes else (0.0,):
        more: dict[str, Any] = {"softcap": softcap} if softcap else {}
        if "position_bias" in takes:
            more["position_bias"] = bias
        given = probe.outcome(eager, twin, q, k, v, mask, scaling=0.4, dropout=0.0, **more)
        y = given[0] if isinstance(given, tuple) else given
        tensors = (q, k, v, mask, bias, sink)
        truth = formula(softcap, *(x.double() for x in tensors))
        if not probe.agrees(y, truth, formula(softcap, *tensors), roundings=4):
            return False
    return True
