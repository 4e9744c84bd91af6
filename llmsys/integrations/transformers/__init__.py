"""Hugging Face models, and any that are built alike, on these kernels: `accelerate` and `restore`.

Modules are known by their structure and by what they compute, not by their names. A kind of module is a file here with
a function `propose(module, model)` and a line in `KINDS`. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from llmsys.integrations.transformers import activations, classes, loss, mlp, norms, rotary, switch
from llmsys.integrations.transformers.classes import Swap
from llmsys.integrations.transformers.report import Line, Report

__all__ = ["KINDS", "Report", "accelerate", "restore"]

KINDS: dict[str, Callable[[nn.Module, nn.Module], Swap | str | None]] = {
    "norm": norms.propose,
    "mlp": mlp.propose,
    "activation": activations.propose,
    "rotary": rotary.propose,
    "attention": switch.propose,
    "loss": loss.propose,
}


def accelerate(model: nn.Module, *, only: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Report:
    """Let norms, MLPs, activations, rotary embeddings, attention and the loss of this `model` run on these kernels, in
    place.

    `only` and `exclude` name kinds (`"norm"`, `"mlp"`, `"activation"`, `"rotary"`, `"attention"`, `"loss"`) or modules,
    by pattern: `"model.layers.0.*"`. A second call starts anew, so that the model is what the last call says. All
    attentions that read one configuration are swapped, or none; none where no kernel of ours could run, as in float64.

    What changes is which code runs, and nothing that is stored: parameters, `state_dict`, hooks, tied weights and the
    names of classes stay. A module is swapped only if its own code, run on small random numbers on its device, computes
    what the op computes. Give the model its weights first; add adapters, checkpointing or `torch.compile` before or
    after, as you like. A module whose `forward` was replaced on the instance is left alone.

    Returns    what was swapped, and what was left and why; print it
    Numerics   equal to the model's own up to rounding; narrow dtypes are rounded once where a model rounds at each step
    Errors     TypeError if model is no nn.Module; ValueError if a name in `only` or `exclude` is no kind and no module
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"llmsys.accelerate: model is a {type(model).__name__}, expected a torch.nn.Module")
    names = [name for name, _ in model.named_modules()]
    for argument, given in (("only", only), ("exclude", exclude)):
        _check_names(argument, given, names)
    restore(model)
    proposed: list[tuple[Line, nn.Module, Swap]] = []
    swapped, left, covered = [], [], set()
    for path, module in model.named_modules():
        if id(module) in covered or type(module).__module__.startswith("llmsys."):
            continue
        for kind, propose in KINDS.items():
            if not _wanted(kind, path, only, exclude):
                continue
            found = propose(module, model)
            if found is not None and "forward" in vars(module):
                found = "its forward was replaced on the instance, and what replaced it would be lost"
            if isinstance(found, Swap):
                covered |= {id(part) for part in found.covers}
                proposed.append((Line(kind, path, type(module).__name__, found.op), module, found))
            elif found is not None:
                left.append(Line(kind, path, type(module).__name__, found))
    changing = {(line.kind, id(module)) for line, module, _ in proposed}
    for line, module, swap in proposed:  # only now: until here every module ran its own code
        if all((line.kind, id(other)) in changing for other in swap.together):
            swap.make(module)
            swapped.append(line)
        else:
            left.append(replace(line, what="others that it can only be swapped together with are left"))
    return Report(type(model).__name__, tuple(swapped), tuple(left))


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module gets the class back that it had. Nothing happens to a model as it was.

    Errors     TypeError if model is no nn.Module; RuntimeError if another library has put its own class over ours
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"llmsys.restore: model is a {type(model).__name__}, expected a torch.nn.Module")
    for path, module in model.named_modules():
        classes.undo(module, path)
        switch.undo(module)


def _check_names(argument: str, given: Sequence[str] | None, names: list[str]) -> None:
    if isinstance(given, str):
        raise ValueError(f"llmsys.accelerate: {argument} is {given!r}, expected a list of names: [{given!r}]")
    for name in given or ():
        if name not in KINDS and not any(fnmatchcase(path, name) for path in names):
            raise ValueError(
                f"llmsys.accelerate: {argument} has {name!r}, expected one of {list(KINDS)} or the name of a module"
            )


def _wanted(kind: str, path: str, only: Sequence[str] | None, exclude: Sequence[str]) -> bool:
    def named(given: Sequence[str]) -> bool:
        return any(name == kind or (name not in KINDS and fnmatchcase(path, name)) for name in given)

    return (only is None or named(only)) and not named(exclude)
