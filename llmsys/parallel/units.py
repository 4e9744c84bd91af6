"""Weights that are whole only while they are used: gathered before a unit's forward and backward, freed after.

A unit is some buckets that are whole at the same times, those of a block of the model, say. A function that reads
weights of units is enclosed: before a call they are gathered; after it they stay until a call needs other ones. What
comes out is hooked: a backward that comes to it gathers them again, if need be, and frees them when it comes to what
went in. Meanwhile the units that followed the last time are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from llmsys.parallel.flat import Flat


@dataclass(eq=False)
class Unit:
    flats: list[Flat]
    here: bool = False  # or on its way


@dataclass(eq=False)
class _Use:
    """A call of an enclosed function, or what a backward does there."""

    place: str
    units: Sequence[Unit]
    in_backward: bool = False
    reads: bool = True


class Units:
    """Which units are here, and who uses them.

    `on_backward` is called in each backward that comes to a unit, once or more often; `end` must be at its end.
    """

    def __init__(self, units: Sequence[Unit], on_backward: Callable[[], None]):
        self._units, self._on_backward = units, on_backward
        self._uses: list[_Use] = []
        self._last: tuple[tuple[str, bool], Sequence[Unit]] | None = None  # place, direction; what was needed there
        self._followers: dict[tuple[str, bool], Sequence[Unit]] = {}

    def enclose_model(self, model: Any, modules: Sequence[nn.Module], ends: Iterable[str]) -> None:
        """Each of `modules`; for the parameters `ends`, which are in none of them, what reads them: the module that has
        one, the model, and its `enter` and `leave`, if it can be cut into pipeline stages."""
        for module in modules:
            self.enclose(module, "forward", self._of(module.parameters()))
        for name in dict.fromkeys(name.rpartition(".")[0] for name in ends):
            owner = model.get_submodule(name)
            if owner is not model:
                self.enclose(owner, "forward", self._of(owner.parameters(recurse=False)), starts=True)
        if model not in modules:
            self.enclose(model, "forward", self._of(model.get_parameter(name) for name in ends))
        if hasattr(model, "ends"):
            for name, children in zip(("enter", "leave"), model.ends(), strict=True):
                held = [child for each in children if (child := getattr(model, each)) is not None]
                parameters = [parameter for child in held for parameter in child.parameters()]
                self.enclose(model, name, self._of(parameters), starts=name == "enter")

    def _of(self, parameters: Iterable[nn.Parameter]) -> list[Unit]:
        mine = set(parameters)
        return [unit for unit in self._units if any(not mine.isdisjoint(flat.parameters) for flat in unit.flats)]

    def enclose(self, owner: nn.Module, name: str, units: Sequence[Unit], *, starts: bool = False) -> None:
        """Have `units` here in each call of `owner.name`, and in its backward.

        starts     the function may be where a graph begins: whether its backward reads weights (the gradient of an
                   embedding does not) is seen from what it saves
        """
        if units:
            function = getattr(owner, name)
            call = partial(self._call, f"{id(owner)}.{name}", tuple(units), starts, function)
            setattr(owner, name, wraps(function)(call))

    @contextmanager
    def all(self) -> Iterator[None]:
        """Every unit is here."""
        use = _Use("all", self._units)
        self._have(use)
        try:
            yield
        finally:
            self._uses.remove(use)
            self._free(self._units)

    def all_here(self) -> bool:
        """Whether within `all`."""
        return any(use.place == "all" for use in self._uses)

    def end(self) -> None:
        """A backward is over."""
        self._uses = [use for use in self._uses if not use.in_backward]
        self._free(self._units)

    def refresh(self) -> None:
        """The shards are others now."""
        self._free(self._units)
        held = [unit for unit in self._units if unit.here]
        for unit in held:
            unit.here = False
        self._start(held)
        self._wait(held)

    # ---- a call and its backward ----

    def _call(
        self, place: str, units: Sequence[Unit], starts: bool, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        forward, backward = _Use(place, units), _Use(place, units, in_backward=True)
        self._need(forward)
        try:
            if not torch.is_grad_enabled():
                return function(*args, **kwargs)
            args = tuple(self._leads_out(backward, x) for x in args)
            kwargs = {key: self._leads_out(backward, x) for key, x in kwargs.items()}
            begins = starts and not any(map(_has_gradient, tree_leaves((args, kwargs))))
            with self._watched(backward) if begins else nullcontext():
                y = function(*args, **kwargs)
        finally:
            self._uses.remove(forward)
        if backward.reads:
            for x in filter(_has_gradient, tree_leaves(y)):
                x.register_hook(partial(self._came, backward))
        return y

    def _leads_out(self, backward: _Use, x: Any) -> Any:
        """`x`, at which a backward has done all that came after: it takes the nodes that were made last first."""
        if _has_gradient(x):
            x = x.view_as(x)
            x.register_hook(partial(self._went, backward))
        return x

    def _watched(self, backward: _Use) -> saved_tensors_hooks:
        backward.reads = False
        weights = {flat.whole.untyped_storage().data_ptr() for unit in backward.units for flat in unit.flats}

        def save(x: Tensor) -> Tensor:
            backward.reads |= x.untyped_storage().data_ptr() in weights
            return x.detach()

        return saved_tensors_hooks(save, lambda x: x)

    def _came(self, backward: _Use, _: Tensor) -> None:
        self._on_backward()
        if backward not in self._uses:
            self._need(backward)

    def _went(self, backward: _Use, _: Tensor) -> None:
        if backward in self._uses:
            self._uses.remove(backward)
            self._free(backward.units)

    # ---- here, or on its way ----

    def _need(self, use: _Use) -> None:
        place = use.place, torch._C._current_graph_task_id() >= 0  # type: ignore[attr-defined]
        self._learn(place, use.units)
        self._have(use)
        self._start(self._followers.get(place, ()))

    def _have(self, use: _Use) -> None:
        self._uses.append(use)
        self._free(self._units)
        self._start(use.units)
        self._wait(use.units)

    def _learn(self, place: tuple[str, bool], units: Sequence[Unit]) -> None:
        """What follows a place in its direction; nothing that did not follow it every time."""
        if self._last is not None:
            before, had = self._last
            turned = before[1] != place[1]
            follow = () if turned else tuple(unit for unit in units if unit not in had)
            if turned or follow:
                self._followers[before] = follow if self._followers.get(before, follow) == follow else ()
        self._last = place, units

    def _start(self, units: Sequence[Unit]) -> None:
        for unit in units:
            if not unit.here:
                unit.here = True
                for flat in unit.flats:
                    flat.start_gather()

    def _free(self, units: Sequence[Unit]) -> None:
        """Those that nobody uses."""
        for unit in units:
            if unit.here and not any(unit in use.units for use in self._uses):
                unit.here = False
                for flat in unit.flats:
                    flat.free()

    def _wait(self, units: Sequence[Unit]) -> None:
        for unit in units:
            for flat in unit.flats:
                flat.finish_gather()


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
