"""Weights in and out of a safetensors file. The file is untrusted: names, shapes, dtypes and bounds are checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.models.decoder import Cut

FLOATS = ("F64", "F32", "BF16", "F16")  # as safetensors writes them


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write every parameter of `model` under its name, each once."""
    from safetensors.torch import save_file

    save_file({name: weight.detach().contiguous() for name, weight in model.named_parameters()}, path)


@torch.no_grad()
def load_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | Path, cut: Mapping[str, Cut] | None = None
) -> None:
    """Copy the weights in `path` into `model`, or into its weights by name, which keep their device and dtype.

    One weight at a time is in memory.

    cut        where `model` is a part of the one in the file: by name, which part of a parameter it has. No more of it
               is read, and nothing of parameters that it does not have

    Errors     FileNotFoundError; ValueError if the file is not safetensors, is cut short, or if a name, a shape or a
               kind of dtype is not the model's. The model is untouched then.
    """
    from safetensors import SafetensorError, safe_open

    where = f"llmsys.models.load_weights: {path}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: no such file")
    weights = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    try:
        with safe_open(path, framework="pt") as file:
            _check(where, file, weights, cut)
            for name, weight in weights.items():
                stored = file.get_slice(name)
                weight.copy_(cut[name].of(stored) if cut and name in cut else stored[:])
    except SafetensorError as error:
        raise ValueError(f"{where}: {error}, expected a whole safetensors file") from error


def _check(where: str, file: Any, weights: Mapping[str, Tensor], cut: Mapping[str, Cut] | None) -> None:
    found = set(file.keys())
    if not found >= weights.keys() or (cut is None and found > weights.keys()):
        raise ValueError(f"{where}: {_difference(found, set(weights))}")
    for name, weight in weights.items():
        stored = file.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        expected = cut[name].whole_shape(weight.shape) if cut and name in cut else tuple(weight.shape)
        if shape != expected:
            raise ValueError(f"{where}: {name} of shape {shape}, expected {expected}")
        if dtype not in FLOATS:
            raise ValueError(f"{where}: {name} of dtype {dtype}, expected one of {', '.join(FLOATS)}")


def _difference(found: set[str], expected: set[str]) -> str:
    parts = []
    if missing := sorted(expected - found):
        parts.append(f"without {', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}")
    if extra := sorted(found - expected):
        parts.append(f"with {', '.join(extra[:4])}{f' and {len(extra) - 4} more' if len(extra) > 4 else ''}")
    return f"weights {' and '.join(parts)}, expected exactly the {len(expected)} names of this model"
