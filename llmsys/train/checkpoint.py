"""Checkpoints: a folder that appears whole or not at all.

    step-00000120/
      model.safetensors        the weights by name
      optimizer.safetensors    the optimizer's tensors, "<parameter index>.<name>"
      state.json               step, config, data position, random state, the optimizer's numbers
      manifest.json            size and SHA-256 of the three files above, written last

All is written and synced in a hidden folder beside the others, then renamed: a kill or a full disk at any moment leaves
the earlier checkpoints as they were. Nothing is unpickled on the way in.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmsys.models.weights import load_weights, save_weights

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class Optimizer(Protocol):
    """What a checkpoint asks of an optimizer."""

    param_groups: list[dict[str, Any]]

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step` under `folder`, then delete all but the last `keep`. Returns its path.

    Errors     RuntimeError if it cannot be written; the earlier checkpoints are untouched then
    """
    tensors, numbers = _split(optimizer.state_dict())
    with new_checkpoint(folder, step, {"optimizer": numbers} | state, keep) as partial:
        save_weights(model, partial / "model.safetensors")
        save_file(tensors, partial / "optimizer.safetensors")
    return checkpoint_of(folder, step)


@contextmanager
def new_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Iterator[Path]:
    """A hidden folder for the two files of tensors, which becomes the checkpoint of `step` when the block ends.

    Errors     those of `save_checkpoint`
    """
    final, partial = checkpoint_of(folder, step), folder / f".partial-step-{step:08d}"
    previous = latest_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".partial-*"):
        shutil.rmtree(left_over)
    try:
        partial.mkdir()
        yield partial
        _write_json(partial / "state.json", {"format": FORMAT, "step": step} | state)
        _write_json(partial / "manifest.json", {name: _fingerprint(partial / name) for name in FILES})
        for name in (*FILES, "manifest.json", "."):
            _sync(partial / name)
        os.rename(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(
            f"llmsys.train.save_checkpoint: {final}: {error}, expected a folder that can be written, "
            f"with room for the checkpoint; the last good one is {previous or 'none'}"
        ) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step under `folder`."""
    return max(_checkpoints(folder), default=None)


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json, once every file of the checkpoint has the size and the hash it was written with.

    Errors     ValueError if a file is missing, cut short or altered
    """
    where = f"llmsys.train.load_checkpoint: {path}"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.keys() != set(FILES):
            raise ValueError(f"{where}: manifest.json names {list(manifest)}, expected {', '.join(FILES)}")
        for name in FILES:
            found = _fingerprint(path / name)
            if found != manifest[name]:
                raise ValueError(f"{where}: {name} is {found}, expected {manifest[name]}; use an earlier checkpoint")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {error}, expected a whole checkpoint; use an earlier one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{where}: state.json is not of format {FORMAT}, expected a checkpoint of this version")
    return state


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Fill `model` and `optimizer` from a checkpoint and return its state; `read_state` says what is refused."""
    state = read_state(path)
    tensors = load_file(path / "optimizer.safetensors")
    shapes = [tuple(weight.shape) for group in optimizer.param_groups for weight in group["params"]]
    for name, tensor in tensors.items():
        check_optimizer_tensor(path, name, tuple(tensor.shape), shapes)
    load_weights(model, path / "model.safetensors")
    optimizer.load_state_dict(_join(tensors, state["optimizer"]))
    return state


def check_optimizer_tensor(path: Path, name: str, shape: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
    """ValueError unless `name` is of one of the parameters of `shapes`, and `shape` is its shape or ()."""
    index = name.partition(".")[0]
    if not index.isdecimal() or int(index) >= len(shapes) or shape not in (shapes[int(index)], ()):
        raise ValueError(
            f"llmsys.train.load_checkpoint: {path}: optimizer tensor {name} of shape {shape}, "
            f"expected the shape of one of {len(shapes)} parameters"
        )


def random_state() -> dict[str, str]:
    """The state of torch's random number generators, as hexadecimal text."""
    state = {"cpu": bytes(torch.get_rng_state().tolist()).hex()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        state[f"cuda:{index}"] = bytes(torch.cuda.get_rng_state(index).tolist()).hex()
    return state


def set_random_state(state: dict[str, str]) -> None:
    for device, text in state.items():
        tensor = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(tensor)
        else:
            torch.cuda.set_rng_state(tensor, device)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdecimal())


def _split(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors for safetensors and numbers for JSON."""
    values = {f"{index}.{key}": value for index, state in state_dict["state"].items() for key, value in state.items()}
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if name not in tensors}
    return tensors, {"numbers": numbers, "param_groups": state_dict["param_groups"]}


def _join(tensors: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in (tensors | saved["numbers"]).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in saved["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
