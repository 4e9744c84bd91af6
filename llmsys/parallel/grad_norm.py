"""The norm of all gradients of a model in parts: every element counted once, whoever holds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from llmsys import ops
from llmsys.parallel import collectives
from llmsys.parallel.mesh import Mesh
from llmsys.parallel.shard import Shard
from llmsys.parallel.zero import Zero


def grad_norm(zero: Zero, mesh: Mesh, shards: Mapping[str, Shard]) -> Tensor:
    """‖all gradients‖₂ after `zero.reduce()`, the same on every rank.

    shards     what `tensor.apply` cut, by name; other parameters are whole on every rank of tp

    Shapes     → (), float32, or float64 where gradients are
    Numerics   as `llmsys.ops.grad_norm`; what ranks have is summed in float64
    Traffic    a number on shard, and one on pp and tp
    """
    parts: dict[int, list[Tensor]] = defaultdict(list)  # by how many ranks hold the same
    for piece, start, part in zero.gradients():
        shard = shards.get(piece.name)
        for holders, run in [(mesh.tp.size, part)] if shard is None else _runs(shard, piece.shape, start, part):
            parts[holders * zero.holders(piece.name)].append(run)
    norms = {holders: ops.grad_norm(those) for holders, those in parts.items()}
    total = torch.stack([norm.double().square() / holders for holders, norm in norms.items()]).sum().to(zero.device)
    squares = collectives.all_reduce(collectives.all_reduce(total, zero.owners), mesh.model)
    return squares.sqrt().to(next(iter(norms.values())).dtype)


def _runs(shard: Shard, shape: tuple[int, ...], start: int, part: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`part`, elements from `start` on of what `shard` is of a weight, in runs; how many ranks hold each."""
    if len({copies for _, _, copies in shard.slices}) == 1:
        yield shard.slices[0].copies, part
        return
    row, end = prod(shape[1:]), -start  # it is outputs, dimension 0, that several ranks hold some of
    for _, length, copies in shard.slices:
        first, end = end, end + length * row
        yield copies, part[max(first, 0) : max(end, 0)]


def clip_grad_norm(zero: Zero, mesh: Mesh, shards: Mapping[str, Shard], max_norm: float) -> Tensor:
    """`grad_norm`, to which all gradients are scaled down, in place, where it is above `max_norm`; as it was before.

        gradients · min(1, max_norm / (norm + 1e-6))

    Numerics   as `torch.nn.utils.clip_grad_norm_`: a norm that is not finite gives NaN
    Errors     ValueError unless max_norm > 0
    """
    if not max_norm > 0:
        raise ValueError(f"llmsys.parallel.clip_grad_norm: max_norm is {max_norm}, expected a number > 0")
    norm = grad_norm(zero, mesh, shards)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, _, part in zero.gradients():
        part.mul_(scale.to(part.device))
    return norm
