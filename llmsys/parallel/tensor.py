"""Tensor parallelism: each rank holds a part of every large weight, and computes that part of every product.

A plan names modules by pattern and says how each is cut:

    column    a linear layer, by its outputs
    heads     the same by whole heads, of the parent's `head_dim`; heads that are fewer than ranks are held by several
    row       a linear layer, by its inputs; by whole heads beside one that is cut so
    vocab     an embedding, or the head that follows the last layer, by tokens of the vocabulary
    sequence  not at all: each rank keeps its part of the sequence, in (…, T, D), of what it gives

A layer that has `sizes` is several in one, such as queries, keys and values: each of them is cut for itself. Modules
that have to know which part of the whole they see are told: `first_head` beside several in one that are cut by heads,
`sequence_part` outside of regions.

A module that has children of both kinds, column or heads and row, is a region: what enters it is whole on every rank,
what its last product leaves is summed. Between regions all ranks hold the same, or, with sequence parallelism, each a
part of the sequence.
Source     Shoeybi et al. 2019, arXiv:1909.08053, section 3; with sequences: Korthikanti et al. 2022, arXiv:2205.05198
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.ops import cross_entropy_parts, merge_cross_entropy
from llmsys.ops.cross_entropy.sharded import Parts
from llmsys.parallel import collectives
from llmsys.parallel.mesh import Axis
from llmsys.parallel.overlap import TOKENS, Overlap, overlap_region
from llmsys.parallel.product import look_up, product
from llmsys.parallel.shard import Shard, shard_of

STYLES = ("column", "heads", "row", "vocab", "sequence")


def apply(
    model: nn.Module,
    plan: Mapping[str, str],
    axis: Axis,
    *,
    sequence_parallel: bool = False,
    overlap_chunks: int = 1,
) -> dict[str, Shard]:
    """Cut `model` in place by `plan`, and hook in what ranks say to each other; what `cut` returns.

    overlap_chunks  how many parts a sequence enters and leaves a region in, each on its way while others are
                    multiplied. What enters must go to column layers alone, as it is, or the region be `tokenwise`. A
                    region that is recomputed by itself sends again what leaves it, but for the last chunk

    Traffic    of a region: 2·(N − 1)/N of its activations forward and as much backward, N the size of the axis; the
               same with sequence_parallel, which keeps 1/N of what lies between regions
    Errors     of `cut` and of `hook`
    """
    shards = cut(model, plan, axis)
    hook(model, plan, axis, shards, sequence_parallel=sequence_parallel, overlap_chunks=overlap_chunks)
    return shards


def cut(model: nn.Module, plan: Mapping[str, str], axis: Axis) -> dict[str, Shard]:
    """What this rank now holds of each parameter that was cut, by name. Nothing else is left, also on the meta device.

    Errors     ValueError for a style that is not one, a pattern that matches no module, or a size that the axis does
               not cut into equal parts
    """
    styles = check(model, plan, axis)
    if axis.size == 1:
        return {}
    shards: dict[str, Shard] = {}
    for name, style in styles.items():
        module: Any = model.get_submodule(name)
        found = _shards(model, styles, name, axis)
        for kind, shard in found.items():
            parameter = module.get_parameter(kind)
            part = shard.of(parameter.data).clone(memory_format=torch.contiguous_format)
            module.register_parameter(kind, nn.Parameter(part, parameter.requires_grad))
        if style in ("column", "heads") and hasattr(module, "sizes"):
            module.sizes = tuple(length for _, length, _ in found["weight"].slices)
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            if hasattr(parent, "first_head"):
                parent.first_head = found["weight"].slices[0].start // _unit(model, styles, name)
        shards |= {f"{name}.{kind}": shard for kind, shard in found.items()}
    return shards


def check(model: nn.Module, plan: Mapping[str, str], axis: Axis) -> dict[str, str]:
    """The style of each module, by name: a plan that `cut` and `hook` take of any part of `model`. Nothing is changed.

    Errors     of `cut`
    """
    styles = _matched(model, plan)
    _regions(model, styles)
    for name in styles:
        _shards(model, styles, name, axis)
    return styles


def hook(
    model: nn.Module,
    plan: Mapping[str, str],
    axis: Axis,
    shards: Mapping[str, Shard],
    *,
    sequence_parallel: bool = False,
    overlap_chunks: int = 1,
) -> None:
    """Make a model that `cut` has cut compute what the whole one does.

    Errors     ValueError for a parameter on the meta device, which `to_empty` would replace, a model whose head is cut
               and which does not say how it uses it, or overlap_chunks below 1
    """
    if overlap_chunks < 1:
        raise ValueError(f"llmsys.parallel.tensor: overlap_chunks={overlap_chunks}, expected 1 or more")
    if axis.size == 1:
        return
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"llmsys.parallel.tensor: {name} is on the meta device, expected one with memory: `cut`, then fill the "
                "model, then `hook`"
            )
    styles = _matched(model, plan)
    regions = _regions(model, styles)
    for name, style in styles.items():
        _adapt(model.get_submodule(name), style, shards.get(f"{name}.weight"), axis, sequence_parallel)
    for region in regions:
        if overlap_chunks == 1:
            _enclose(model.get_submodule(region), axis, sequence_parallel)
        else:
            children = {name: style for name, style in styles.items() if name.rpartition(".")[0] == region}
            overlap_region(model, region, children, Overlap(axis, sequence_parallel, overlap_chunks))
    if "vocab" in styles.values():
        _replace_head(model, axis, sequence_parallel)
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{region}.") for region in regions)
        if sequence_parallel and not inside and hasattr(module, "sequence_part"):
            module.sequence_part = (axis.rank, axis.size)  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        inside = any(name.startswith(f"{region}.") for region in regions)
        if name in shards:
            _sum_copies(parameter, shards[name], axis)
        elif inside or sequence_parallel:
            _sum_gradients(parameter, axis)


# ---- the plan ----


def _matched(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Module name → style. A pattern may match a module that this model leaves None, such as a head that is tied."""
    names = [name for name, _ in model.named_modules()]
    absent = [
        f"{parent}.{child}".lstrip(".")
        for parent, module in model.named_modules()
        for child in (*(name for name, value in module._modules.items() if value is None), *_none_attributes(module))
    ]
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ValueError(f"llmsys.parallel.tensor: {pattern!r} is {style!r}, expected one of {', '.join(STYLES)}")
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found and not any(fnmatchcase(name, pattern) for name in absent):
            raise ValueError(
                f"llmsys.parallel.tensor: {pattern!r} matches no module of {type(model).__name__}, expected a pattern "
                f"of names such as {next((name for name in names if name.count('.') > 1), names[-1])!r}"
            )
        styles |= dict.fromkeys(found, style)
    return styles


def _none_attributes(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if value is None and not name.startswith("_")]


def _regions(model: nn.Module, styles: Mapping[str, str]) -> list[str]:
    """Names of the modules that have cut inputs and outputs among their children."""
    kinds: dict[str, set[str]] = {}
    for name, style in styles.items():
        if style not in ("vocab", "sequence"):
            kinds.setdefault(name.rpartition(".")[0], set()).add("row" if style == "row" else "column")
    for parent, found in kinds.items():
        if len(found) == 1:
            children = ", ".join(name for name in styles if name.rpartition(".")[0] == parent)
            raise ValueError(
                f"llmsys.parallel.tensor: of {parent or 'the model'} {children} cut by {found.pop()} alone, expected "
                "column or heads and then row within one module"
            )
    return list(kinds)


def _unit(model: nn.Module, styles: Mapping[str, str], name: str) -> int:
    """How many inputs or outputs of a layer stay together."""
    parent = name.rpartition(".")[0]
    beside = {style for other, style in styles.items() if other.rpartition(".")[0] == parent}
    by_heads = styles[name] == "heads" or (styles[name] == "row" and "heads" in beside)
    return int(model.get_submodule(parent).head_dim) if by_heads else 1  # type: ignore[arg-type]


def _shards(model: nn.Module, styles: Mapping[str, str], name: str, axis: Axis) -> dict[str, Shard]:
    """Of each parameter that a module itself has, and that is cut."""
    module, unit = model.get_submodule(name), _unit(model, styles, name)
    found = {
        kind: shard_of(f"{name}.{kind}", styles[name], module, unit, parameter, axis)
        for kind, parameter in module.named_parameters(recurse=False)
    }
    return {kind: shard for kind, shard in found.items() if shard is not None}


def _adapt(module: Any, style: str, shard: Shard | None, axis: Axis, sequence_parallel: bool) -> None:
    """What a module that is cut does otherwise; `shard` is that of its weight."""
    embeds = isinstance(module, nn.Embedding)
    if style == "row" and getattr(module, "bias", None) is not None:
        module.forward = partial(_row_linear, module, axis.rank == 0)
    if style == "vocab" and embeds and shard is not None:
        module.forward = partial(_embedding, module, shard.slices[0].start, axis, sequence_parallel)
    if style == "sequence" and sequence_parallel:
        module.register_forward_hook(lambda module, args, y: collectives.own_part(y, axis, y.dim() - 2))


# ---- regions ----


def _enclose(region: nn.Module, axis: Axis, sequence_parallel: bool) -> None:
    def enter(module: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        return (_enter(x, axis, sequence_parallel), *rest)

    def leave(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        return _leave(y, axis, sequence_parallel)

    region.register_forward_pre_hook(enter)
    region.register_forward_hook(leave)


def _enter(x: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
    return collectives.gather_in(x, axis, TOKENS) if sequence_parallel else collectives.copy_in(x, axis)


def _leave(y: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
    return collectives.scatter_out(y, axis, TOKENS) if sequence_parallel else collectives.reduce_out(y, axis)


def _row_linear(module: Any, first: bool, x: Tensor) -> Tensor:
    """The bias, of which every rank has all, is added by the first one alone."""
    y = product(x, module.weight)
    return y + (module.bias if first else module.bias * 0).to(y.dtype)


def _sum_gradients(parameter: nn.Parameter, axis: Axis) -> None:
    """Each backward adds what all ranks of the axis found."""
    if parameter.requires_grad:
        parameter.register_hook(lambda grad: None if grad is None else collectives.all_reduce(grad.clone(), axis))


def _sum_copies(parameter: nn.Parameter, shard: Shard, axis: Axis) -> None:
    """Each backward adds what the ranks that hold the same found, of the slices that several hold."""

    def summed(grad: Tensor | None) -> Tensor | None:
        if grad is None:  # it is put off
            return None
        grad = grad.clone(memory_format=torch.contiguous_format)
        for part, (_, _, copies) in zip(grad.split([each.length for each in shard.slices]), shard.slices, strict=True):
            if copies > 1:
                collectives.all_reduce(part, _sharing(axis, copies))
        return grad

    if parameter.requires_grad and any(copies > 1 for _, _, copies in shard.slices):
        parameter.register_hook(summed)


def _sharing(axis: Axis, copies: int) -> Axis:
    """The neighbours that hold the same head."""
    first = axis.rank // copies * copies
    return Axis(axis.name, axis.ranks[first : first + copies], axis.rank - first)


# ---- the vocabulary ----


def _embedding(module: nn.Embedding, start: int, axis: Axis, sequence_parallel: bool, tokens: Tensor) -> Tensor:
    """The rows that this rank holds, zeros for others, summed."""
    local = tokens - start
    here = (local >= 0) & (local < module.weight.shape[0])
    found = look_up(local.where(here, 0), module.weight) * here.unsqueeze(-1)
    return _leave(found, axis, sequence_parallel)


def _replace_head(model: Any, axis: Axis, sequence_parallel: bool) -> None:
    for name in ("unembed", "cross_entropy"):
        if not hasattr(model, name):
            raise ValueError(
                f"llmsys.parallel.tensor: {type(model).__name__} has no `{name}`, expected the function of (hidden, "
                "weight) that makes its logits and that of (hidden, weight, targets) that is its loss, to replace them"
            )
    model.unembed = partial(_logits, axis, sequence_parallel)
    model.cross_entropy = partial(_loss, axis, sequence_parallel)


def _logits(axis: Axis, sequence_parallel: bool, hidden: Tensor, weight: Tensor) -> Tensor:
    return collectives.join(product(_enter(hidden, axis, sequence_parallel), weight), axis, hidden.dim() - 1)


def _loss(
    axis: Axis, sequence_parallel: bool, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Mean over the targets that count; the logits of the whole vocabulary are nowhere.

    Traffic    three numbers a token on the axis, besides what enters
    """
    logits = product(_enter(hidden, axis, sequence_parallel), weight)
    parts = cross_entropy_parts(logits, targets, axis.rank * weight.shape[0], ignore_index=ignore_index)
    highest = collectives.all_reduce(parts.max.clone(), axis, "max")
    total = collectives.reduce_out(parts.sum * torch.exp(parts.max - highest), axis)
    target = collectives.reduce_out(parts.target, axis)
    loss, _ = merge_cross_entropy([Parts(highest, total, target)], targets, ignore_index=ignore_index)
    return loss.sum() / (targets != ignore_index).sum()
