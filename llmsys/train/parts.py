"""Tensors that the ranks of a job hold in parts, in the same safetensors files that one process writes.

Rank 0 writes, tensor after tensor, as their parts come: it holds one whole tensor at most. Every rank reads for itself,
what it holds and no more.
"""

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsys.parallel import Axis
from llmsys.parallel.collectives import all_gather, start_receive, start_send
from llmsys.parallel.shard import Shard, Slice

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # ours → those of safetensors


class Part(NamedTuple):
    """Of a tensor, [start, start + length) of dimension `dim` for each of `slices`, one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor; () has a dimension of one number
    dim: int
    slices: tuple[tuple[int, int], ...]

    @property
    def own_shape(self) -> tuple[int, ...]:
        own = sum(length for _, length in self.slices)
        return tuple(own if dim == self.dim else size for dim, size in enumerate(self.shape or (1,)))

    def of(self, x: Any) -> Tensor:
        """That part of the whole, a tensor or what is indexed like one."""
        return self._shard.of(x)

    def put(self, whole: Tensor, own: Tensor) -> None:
        """Into the whole."""
        parts = own.view(self.own_shape).split([length for _, length in self.slices], self.dim)
        for place, part in zip(self._shard.slices_of(whole), parts, strict=True):
            place.copy_(part)

    @property
    def _shard(self) -> Shard:
        return Shard(self.dim, (self.shape or (1,))[self.dim], tuple(Slice(*each) for each in self.slices))


class Place(NamedTuple):
    """Elements [first, first + numel), flat, of a part."""

    part: Part
    first: int
    numel: int


def write(path: Path | None, places: dict[Place, Tensor], axis: Axis, device: torch.device) -> None:
    """Write the whole tensors of which the ranks of `axis` hold these places, flat; rank 0 of it gives the path.

    Of what several ranks hold, the first one's goes into the file.
    Errors     RuntimeError if parts are missing
    """
    sources: dict[str, dict[Place, int]] = {}
    for rank, theirs in enumerate(_everyones(list(places), axis, device)):
        for place in theirs:
            sources.setdefault(place.part.name, {}).setdefault(place, rank)
    if axis.rank:
        for place, source in (each for found in sources.values() for each in found.items()):
            if source == axis.rank:
                start_send(_bytes(places[place].to(device)), axis, 0).wait()
        return
    assert path is not None
    with open(path, "wb") as file:
        file.write(_header([next(iter(found)).part for found in sources.values()]))
        for found in sources.values():
            file.write(_bytes(_whole(found, places, axis, device)).numpy().data)


def read(path: Path, targets: dict[Place, Tensor]) -> None:
    """Copy what the file at `path` has at each place into the flat tensor that is given for it."""
    with safe_open(path, framework="pt") as file:
        for place, target in targets.items():
            name = place.part.name
            own = place.part.of(file.get_slice(name)) if place.part.shape else file.get_tensor(name)
            target.copy_(own.flatten()[place.first : place.first + place.numel])


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """What tensors there are in the file at `path`.

    Errors     ValueError if it is not safetensors
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"llmsys.train.load_checkpoint: {path}: {error}, expected a safetensors file") from error


def _everyones(places: list[Place], axis: Axis, device: torch.device) -> list[list[Place]]:
    """The places of every rank, in the order of the axis."""
    text = torch.frombuffer(bytearray(json.dumps(places), "utf-8"), dtype=torch.uint8).to(device)
    sizes = all_gather(torch.tensor([text.numel()], device=device), axis).tolist()
    padded = text.new_zeros(max(sizes))
    padded[: text.numel()] = text
    texts = all_gather(padded, axis).view(len(sizes), -1).cpu()
    everyones = [json.loads(bytes(row[:size].tolist())) for row, size in zip(texts, sizes, strict=True)]
    return [[Place(_part(*part), *rest) for part, *rest in theirs] for theirs in everyones]


def _part(name: str, dtype: str, shape: list[int], dim: int, slices: list[list[int]]) -> Part:
    return Part(name, dtype, tuple(shape), dim, tuple((start, length) for start, length in slices))


def _whole(sources: dict[Place, int], places: dict[Place, Tensor], axis: Axis, device: torch.device) -> Tensor:
    parts = list(dict.fromkeys(place.part for place in sources))
    dtype: torch.dtype = getattr(torch, parts[0].dtype)
    whole = torch.empty(parts[0].shape or (1,), dtype=dtype)
    lacking = whole.shape[parts[0].dim] - sum(length for _, length in {each for part in parts for each in part.slices})
    for part in parts:
        own = torch.empty(prod(part.own_shape), dtype=dtype)
        lacking += own.numel()
        for place, source in sources.items():
            if place.part == part:
                own[place.first : place.first + place.numel] = _fetched(place, source, places, axis, device)
                lacking -= place.numel
        part.put(whole, own)
    if lacking:
        raise RuntimeError(
            f"llmsys.train.parts: {parts[0].name} of shape {parts[0].shape} in parts {parts} that lack some of it, "
            "expected all of it on the ranks together"
        )
    return whole


def _fetched(place: Place, source: int, places: dict[Place, Tensor], axis: Axis, device: torch.device) -> Tensor:
    if source == axis.rank:
        return places[place].cpu()
    dtype: torch.dtype = getattr(torch, place.part.dtype)
    out = torch.empty(place.numel, dtype=dtype, device=device)
    start_receive(_bytes(out), axis, source).wait()
    return out.cpu()


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return x.reshape(-1).view(torch.uint8)


def _header(tensors: list[Part]) -> bytes:
    """What a safetensors file begins with. Source: https://github.com/huggingface/safetensors#format."""
    entries, end = {}, 0
    for name, dtype, shape, *_ in tensors:
        begin, end = end, end + prod(shape) * getattr(torch, dtype).itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that what follows is aligned
    return len(text).to_bytes(8, "little") + text
