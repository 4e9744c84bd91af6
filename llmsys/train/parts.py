"""Tensors that the ranks of a job hold in parts, in the same safetensors files that one process writes.

Rank 0 writes, tensor after tensor, as their parts come: it holds one whole tensor at most. Every rank reads for itself,
what it holds and no more.
"""

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsys.parallel import Axis
from llmsys.parallel.collectives import all_gather, start_receive, start_send

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # ours → those of safetensors


class Place(NamedTuple):
    """Elements [first, first + numel), flat, of [start, start + length) of dimension `dim` of a tensor.

    All of the tensor where dim is -1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dim: int
    start: int
    length: int
    first: int
    numel: int

    @property
    def part(self) -> tuple[int, int, int]:
        """Which part of the whole tensor `first` and `numel` are of."""
        return self.dim, self.start, self.length


def write(path: Path | None, parts: dict[Place, Tensor], axis: Axis, device: torch.device) -> None:
    """Write the whole tensors whose parts the ranks of `axis` hold, each of them flat; rank 0 of it gives the path.

    Of what several ranks hold, the first one's goes into the file.
    Errors     RuntimeError if parts are missing
    """
    sources: dict[str, dict[Place, int]] = {}
    for rank, places in enumerate(_everyones(list(parts), axis, device)):
        for place in places:
            sources.setdefault(place.name, {}).setdefault(place, rank)
    if axis.rank:
        for place, source in (each for found in sources.values() for each in found.items()):
            if source == axis.rank:
                start_send(_bytes(parts[place].to(device)), axis, 0).wait()
        return
    assert path is not None
    with open(path, "wb") as file:
        file.write(_header([next(iter(found)) for found in sources.values()]))
        for found in sources.values():
            file.write(_bytes(_whole(found, parts, axis, device)).numpy().data)


def read(path: Path, targets: dict[Place, Tensor]) -> None:
    """Copy what the file at `path` has at each place into the flat tensor that is given for it."""
    with safe_open(path, framework="pt") as file:
        for place, target in targets.items():
            cut = (*[slice(None)] * place.dim, slice(place.start, place.start + place.length))
            part = file.get_tensor(place.name) if place.dim < 0 else file.get_slice(place.name)[cut]
            target.copy_(part.flatten()[place.first : place.first + place.numel])


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
    return [
        [
            Place(name, dtype, tuple(shape), *rest)
            for name, dtype, shape, *rest in json.loads(bytes(row[:size].tolist()))
        ]
        for row, size in zip(texts, sizes, strict=True)
    ]


def _whole(sources: dict[Place, int], parts: dict[Place, Tensor], axis: Axis, device: torch.device) -> Tensor:
    place = next(iter(sources))
    dtype: torch.dtype = getattr(torch, place.dtype)
    whole = torch.empty(place.shape, dtype=dtype)
    missing = whole.numel()
    for dim, start, length in dict.fromkeys(place.part for place in sources):
        target = whole if dim < 0 else whole.narrow(dim, start, length)
        part = torch.empty(target.numel(), dtype=dtype)
        for place, source in sources.items():
            if place.part == (dim, start, length):
                part[place.first : place.first + place.numel] = _fetched(place, source, parts, axis, device)
                missing -= place.numel
        target.copy_(part.view(target.shape))
    if missing:
        raise RuntimeError(
            f"llmsys.train.parts: {place.name} of shape {place.shape} lacks {missing} elements, expected all of them "
            "on the ranks together"
        )
    return whole


def _fetched(place: Place, source: int, parts: dict[Place, Tensor], axis: Axis, device: torch.device) -> Tensor:
    if source == axis.rank:
        return parts[place].cpu()
    dtype: torch.dtype = getattr(torch, place.dtype)
    out = torch.empty(place.numel, dtype=dtype, device=device)
    start_receive(_bytes(out), axis, source).wait()
    return out.cpu()


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return x.reshape(-1).view(torch.uint8)


def _header(tensors: list[Place]) -> bytes:
    """What a safetensors file begins with. Source: https://github.com/huggingface/safetensors#format."""
    entries, end = {}, 0
    for name, dtype, shape, *_ in tensors:
        begin, end = end, end + prod(shape) * getattr(torch, dtype).itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that what follows is aligned
    return len(text).to_bytes(8, "little") + text
