"""Checkpoints of a job of ranks: the files of one process, so that any layout goes on from them."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.parallel import Parallel, zero
from llmsys.parallel.connect import once
from llmsys.train import parts
from llmsys.train.checkpoint import (
    Optimizer,
    check_optimizer_tensor,
    checkpoint_of,
    new_checkpoint,
    read_state,
)
from llmsys.train.parts import Place


class PartsCheckpoint:
    """Saves and loads what the ranks of a job hold of a model and of the optimizer of its shards.

    shapes     of the whole model's parameters, in its order
    device     of this rank
    """

    def __init__(
        self, parallel: Parallel, optimizer: Optimizer, shapes: dict[str, tuple[int, ...]], device: torch.device
    ):
        self.parallel, self.optimizer, self.shapes, self.device = parallel, optimizer, shapes, device
        matrices = [name for name, shape in shapes.items() if len(shape) > 1]
        order = matrices + [name for name, shape in shapes.items() if len(shape) == 1]
        # What the optimizer of one process calls each parameter: its number in `trainer.decay_groups`.
        self.numbers = {name: number for number, name in enumerate(order)}
        self.groups = [list(range(len(matrices))), list(range(len(matrices), len(order)))]

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
        """As `checkpoint.save_checkpoint`, by all ranks together; one that fails ends the others' wait."""
        world, found = self.parallel.mesh.world, self.optimizer.state_dict()
        groups = [
            group | {"params": numbers} for group, numbers in zip(found["param_groups"], self.groups, strict=True)
        ]
        saved = {"optimizer": {"numbers": {}, "param_groups": groups}} | state
        with nullcontext() if world.rank else new_checkpoint(folder, step, saved, keep) as partial:
            for name, tensors in (("model", self._weights()), ("optimizer", self._states(found["state"]))):
                parts.write(partial and partial / f"{name}.safetensors", dict(tensors), world, self.device)
        return checkpoint_of(folder, step)

    @torch.no_grad()
    def load(self, path: Path) -> dict[str, Any]:
        """As `checkpoint.load_checkpoint`; rank 0 checks it for all."""
        state = once(lambda: self._checked(path))
        parts.read(path / "model.safetensors", dict(self._weights()))
        self.parallel.gather()
        states, targets = self._empty_states(parts.shapes_in(path / "optimizer.safetensors"))
        parts.read(path / "optimizer.safetensors", targets)
        groups, first = [], 0
        for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            numbers = list(range(first, first := first + len(group["params"])))
            groups.append(saved | {"betas": tuple(saved["betas"]), "params": numbers})
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        return state

    def _checked(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint that is whole and of this model."""
        state = read_state(path)
        found = parts.shapes_in(path / "model.safetensors")
        for name in sorted({*found, *self.shapes}):
            if found.get(name) != self.shapes.get(name):
                raise ValueError(
                    f"llmsys.train.load_checkpoint: {path}: {name} of shape {found.get(name)}, expected "
                    f"{self.shapes.get(name)} as in this model"
                )
        shapes = [self.shapes[name] for name in self.numbers]
        for name, shape in parts.shapes_in(path / "optimizer.safetensors").items():
            check_optimizer_tensor(path, name, shape, shapes)
        return state

    # ---- what this rank holds, and where that is in the whole ----

    def _places(self) -> Iterator[tuple[zero.Part, Place]]:
        for part in self.parallel.zero.parts():
            name, shape = part.piece.name, self.shapes[part.piece.name]
            cut = self.parallel.cut.get(name)
            dim = cut.dim if cut else 0
            slices = tuple((start, length) for start, length, _ in cut.slices) if cut else ((0, shape[0]),)
            numel = part.where.stop - part.where.start
            yield part, Place(parts.Part(name, _name(part.shard.dtype), shape, dim, slices), part.start, numel)

    def _weights(self) -> Iterator[tuple[Place, Tensor]]:
        for part, place in self._places():
            if place.numel:
                yield place, part.shard.data[part.where]

    def _states(self, saved: dict[int, dict[str, Tensor]]) -> Iterator[tuple[Place, Tensor]]:
        indices = self._indices()
        for part, place in self._places():
            for key, value in saved.get(indices[part.shard], {}).items():
                yield from _state(f"{self.numbers[part.piece.name]}.{key}", value, part, place)

    def _empty_states(
        self, shapes: dict[str, tuple[int, ...]]
    ) -> tuple[dict[int, dict[str, Tensor]], dict[Place, Tensor]]:
        """States of the shards for an optimizer's state dict, and where in them each place of a file belongs."""
        indices = self._indices()
        states: dict[int, dict[str, Tensor]] = {}
        targets: dict[Place, Tensor] = {}
        for part, place in self._places():
            number = f"{self.numbers[part.piece.name]}."
            for name in (name for name in shapes if name.startswith(number)):
                state, key = states.setdefault(indices[part.shard], {}), name.removeprefix(number)
                if key not in state:
                    wide = torch.promote_types(part.shard.dtype, torch.float32)
                    state[key] = part.shard.new_zeros(part.shard.shape if shapes[name] else (), dtype=wide)
                targets |= dict(_state(name, state[key], part, place))
        return states, targets

    def _indices(self) -> dict[nn.Parameter, int]:
        """What this rank's optimizer calls each shard."""
        shards = (shard for group in self.optimizer.param_groups for shard in group["params"])
        return {shard: index for index, shard in enumerate(shards)}


def _state(name: str, value: Tensor, part: zero.Part, place: Place) -> Iterator[tuple[Place, Tensor]]:
    """A state of a shard as far as it is of one parameter; a number is of each."""
    if value.dim() == 0:
        yield Place(parts.Part(name, _name(value.dtype), (), 0, ((0, 1),)), 0, 1), value.view(1)
    elif place.numel:
        yield place._replace(part=place.part._replace(name=name, dtype=_name(value.dtype))), value[part.where]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
