"""Weights in and out of a safetensors file. The file is untrusted: names, shapes, dtypes and bounds are checked."""

from pathlib import Path

import torch
from torch import nn


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write every parameter of `model` under its name, each once."""
    from safetensors.torch import save_file

    save_file({name: weight.detach().contiguous() for name, weight in model.named_parameters()}, path)


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in `path` into `model`, which keeps its device and dtype.

    Errors     FileNotFoundError; ValueError if the file is not safetensors, is cut short, or if a name, a shape or a
               kind of dtype is not the model's. The model is untouched then.
    """
    from safetensors import SafetensorError, safe_open

    where = f"llmsys.models.load_weights: {path}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: no such file")
    expected = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != expected.keys():
                raise ValueError(f"{where}: {_difference(found, set(expected))}")
            for name, weight in expected.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(weight.shape):
                    raise ValueError(f"{where}: {name} of shape {shape}, expected {tuple(weight.shape)}")
            loaded = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"{where}: {error}, expected a whole safetensors file") from error
    for name, tensor in loaded.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} of {tensor.dtype}, expected a floating-point dtype")
    for name, weight in expected.items():
        weight.copy_(loaded[name])


def _difference(found: set[str], expected: set[str]) -> str:
    parts = []
    if missing := sorted(expected - found):
        parts.append(f"without {', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}")
    if extra := sorted(found - expected):
        parts.append(f"with {', '.join(extra[:4])}{f' and {len(extra) - 4} more' if len(extra) > 4 else ''}")
    return f"weights {' and '.join(parts)}, expected exactly the {len(expected)} names of this model"
