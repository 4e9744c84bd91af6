"""Activations that backward computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Let modules whose names match keep their inputs alone: backward runs their forward again, then its own.

    The names of the modules; random numbers are drawn again as they were. Hooks of the modules do not run again, those
    of modules in them do.
    Cost       a forward more of each
    Errors     of `matched`
    Source     Chen et al. 2016, arXiv:1604.06174
    """
    found = matched(model, patterns)
    for name in found:
        module = model.get_submodule(name)
        module.forward = partial(_again, module.forward)  # type: ignore[method-assign]
    return found


def matched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The names of the modules that match.

    Errors     ValueError for a pattern that matches no module
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        new = [name for name in names if fnmatchcase(name, pattern)]
        if not new:
            raise ValueError(
                f"llmsys.memory.recompute: {pattern!r} matches no module of {type(model).__name__}, expected a pattern "
                f"of names such as {names[-1] if names else ''!r}"
            )
        found += [name for name in new if name not in found]
    return found


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
