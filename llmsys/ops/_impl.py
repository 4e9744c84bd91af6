"""One way to compute an op, and what is told of the choice between several."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmsys import env


@dataclass(frozen=True)
class Impl:
    """One way to compute an op, on tensors of `devices` (None: of any). `why_not(*args)` is None when it can run, else
    one short reason.

    `forward` and `backward` are pure functions of tensors with the op's schema as signature. Both take `out=`, which
    their caller has checked: the large results are then written there. `infer`, where there is one, is `forward`
    without what only a backward needs. `why_slower(*args)`, where there is one, is None or one short reason to leave
    the call to an implementation further down the list; one that is forced runs all the same. `backward_once`, where
    there is one, is `backward` for when nobody reads what was saved after it: it may write over what `forward` made.
    `backward_in_parts`, where there is one, gives what `backward` does in two, and makes but once what both need: the
    results without the gradients of weights that can wait, and a function that gives the results with those alone, each
    as a tensor or as a `Product`.
    """

    name: str
    forward: Callable
    backward: Callable | None = None
    why_not: Callable[..., str | None] = lambda *args: None
    devices: tuple[str, ...] | None = None
    infer: Callable | None = None
    why_slower: Callable[..., str | None] | None = None
    backward_once: Callable | None = None
    backward_in_parts: Callable | None = None

    def reason(self, device: str, args: tuple) -> str | None:
        """Why this cannot run on `args`, which are on `device`; None when it can."""
        if self.devices is not None and device not in self.devices:
            return f"runs on {' and '.join(self.devices)} tensors, given {device}"
        return self.why_not(*args)

    def slower(self, args: tuple) -> str | None:
        """Why another implementation is the better choice for `args`; None when this one is."""
        return None if self.why_slower is None else self.why_slower(*args)


def triton(module: str) -> Impl:
    """The Triton implementation whose `forward` and `backward` are in `module`, which is imported at first use."""

    def why_not(*args: Any) -> str | None:
        if not env.has("triton"):
            return "triton is not installed"
        return "no kernel for torch.float64" if first_tensor(args).dtype == torch.float64 else None

    def call(name: str) -> Callable:
        return lambda *args, **kwargs: getattr(importlib.import_module(module), name)(*args, **kwargs)

    devices = ("cuda", "cpu") if env.triton_interpreted() else ("cuda",)
    return Impl("triton", call("forward"), call("backward"), why_not, devices)


@dataclass(frozen=True)
class Explanation:
    """Which implementation of an op would run, and why those before it would not."""

    op: str
    chosen: str | None
    reasons: dict[str, str | None]  # implementation → None when it can run, else why not

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'nothing can run'}"]
        for name, reason in self.reasons.items():
            lines.append(f"  {name:<10} {'chosen' if name == self.chosen else reason or 'could run'}")
        return "\n".join(lines)


def first_tensor(args: tuple) -> torch.Tensor:
    """The first tensor among an op's arguments, in lists too."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg:
            return first_tensor(tuple(arg))
    raise AssertionError("an op has at least one tensor argument")
