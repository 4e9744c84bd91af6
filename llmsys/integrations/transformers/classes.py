"""How one module changes its forward and nothing else: its class becomes a subclass of what it was.

Parameters, buffers, submodules, hooks and `state_dict` stay the module's own; `isinstance` holds, and so does the
class's name, by which policies of FSDP and of transformers find modules. Putting the old class back undoes all of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import nn


class Swapped(nn.Module):
    """What a module's class derives from while it runs on our kernels."""

    original: type[nn.Module]  # the class that the module had before
    _made_of: tuple

    @classmethod
    def members(cls, original: type[nn.Module], attributes: dict[str, Any]) -> dict[str, Any]:
        """What else the new class has that depends on the class it derives from."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists under no name that pickle could look up: it is made anew from what it was made of.
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, self._made_of, *reduced[2:]


@dataclass(frozen=True)
class Swap:
    """What a module is to become: a `mixin` whose methods call `op`, with `attributes` that suit this module."""

    op: str
    mixin: type[Swapped]
    attributes: dict[str, Any] = field(default_factory=dict)
    covers: tuple = ()  # submodules that `op` does the work of
    partners: tuple[tuple[nn.Module, Swap], ...] = ()  # other modules that change with this one
    together: tuple[nn.Module, ...] = ()  # modules of its kind without which it is not swapped

    def make(self, module: nn.Module) -> None:
        for partner, swap in self.partners:
            swap.make(partner)
        made_of: tuple[Any, ...] = (type(module), self.mixin, tuple(sorted(self.attributes.items())))
        module.__class__ = _subclass(*made_of)


def undo(module: nn.Module, name: str) -> None:
    """Give `module` the class back that it had before.

    Errors     RuntimeError if someone has since put another class over ours
    """
    while issubclass(cls := type(module), Swapped):
        if "_made_of" not in vars(cls):
            raise RuntimeError(
                f"llmsys.restore: {name or 'the model'} was given the class {cls} after llmsys.accelerate, "
                "expected the class that accelerate gave it; undo the later change first"
            )
        module.__class__ = cls.original


@functools.cache
def _subclass(cls: Any, mixin: Any, attributes: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours = {"original": cls, "_made_of": (cls, mixin, attributes), **dict(attributes)}
    return type(cls.__name__, (mixin, cls), same | ours | mixin.members(cls, dict(attributes)))


def _blank(*made_of: Any) -> nn.Module:
    """An empty module of a class that `_subclass` makes, for pickle and deepcopy to fill."""
    cls = _subclass(*made_of)
    return cls.__new__(cls)
