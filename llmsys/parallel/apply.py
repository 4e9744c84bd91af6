"""A model for one process made into this rank's part of it: the one place that knows in which order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import memory
from llmsys.memory.recompute import matched
from llmsys.parallel import tensor
from llmsys.parallel.grad_norm import clip_grad_norm
from llmsys.parallel.mesh import Mesh
from llmsys.parallel.pipeline import Pipeline
from llmsys.parallel.shard import Shard
from llmsys.parallel.zero import BUCKET_BYTES, Zero

Fill = Callable[[Mapping[str, Tensor], Mapping[str, Shard]], None]


class Parallel:
    """What `parallelize` gives: this rank's part of a model, and the steps of its training.

    optimizer = AdamW(parallel.shards())
    loss = parallel.backward(microbatches)      # gradients: of the mean over all microbatches of all ranks
    norm = parallel.clip_grad_norm(1.0)
    optimizer.step()
    parallel.gather()                           # every rank has what the others updated

    `parallel.step(optimizer)` does the last two, one beside the other. Weights are read within `parallel.whole()`.
    A model that has `at` is told step and microbatch before each forward, for its dropout. `num_steps` counts steps;
    who goes on from a checkpoint sets it. Microbatches are numbered over all ranks of dp, one rank's in a row.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        pipeline: Pipeline,
        cut: Mapping[str, Shard],
        zero: Zero,
        sequence_parts: int,
    ):
        self.model, self.mesh, self.pipeline, self.cut, self.zero = model, mesh, pipeline, cut, zero
        self.shards, self.gather, self.step, self.whole = zero.shards, zero.gather, zero.step, zero.whole
        self.num_steps, self.sequence_parts = 0, sequence_parts

    def backward(self, micros: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean loss of this rank's microbatches (tokens, targets), which all ranks of pp and tp are given alike.

        Errors     ValueError, on every rank, for a sequence that sequence parallelism does not cut into equal parts, or
                   that the model's `check_length`, if it has one, refuses
        """
        self._check(micros)
        first, at = self.mesh.dp.rank * len(micros), getattr(self.model, "at", lambda step, micro: None)
        with self.zero.direct(len(micros)):
            loss = self.pipeline.step(
                micros,
                before=lambda micro: at(self.num_steps, first + micro),
                accumulating=self.zero.accumulating,
                holding=self.zero.holding,
            )
        self.zero.reduce()
        self.num_steps += 1
        return loss

    def evaluate(self, micros: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The same loss, without gradients."""
        self._check(micros)
        return self.pipeline.evaluate(micros)

    def _check(self, micros: Sequence[tuple[Tensor, Tensor]]) -> None:
        check_length = getattr(self.model, "check_length", lambda tokens: None)
        for tokens, _ in micros:
            check_length(tokens)
            if tokens.shape[-1] % self.sequence_parts:
                raise ValueError(
                    f"llmsys.parallel.backward: tokens of shape {tuple(tokens.shape)}, expected sequences whose length "
                    f"is a multiple of the {self.sequence_parts} ranks of {self.mesh.tp}, with sequence_parallel"
                )

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The norm of all gradients, which are scaled down where it is above `max_norm`."""
        return clip_grad_norm(self.zero, self.mesh, self.cut, max_norm)


def parallelize(
    model: nn.Module,
    plan: Mapping[str, Any],
    mesh: Mesh,
    *,
    zero: int = 0,
    schedule: str = "1f1b",
    chunks_per_stage: int | None = None,
    costs: Sequence[float] | None = None,
    sequence_parallel: bool = False,
    overlap_chunks: int = 1,
    recompute: str = "none",
    device: torch.device | str | None = None,
    seed: int | None = None,
    fill: Fill | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    master_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    offload: bool = False,
    group_of: Callable[[str, nn.Parameter], Hashable] = lambda name, parameter: None,
) -> Parallel:
    """Keep of `model` what this rank holds, by `plan`, and hook in what it says to others.

    plan       as beside each model: "tensor", patterns of modules and how each is cut; "stages", the name of its
               blocks; "recompute", patterns of modules
    recompute  what backward computes again: "none", "selective" (what the plan says) or "full" (each block)

    A model on the meta device gets memory on `device`, the CPU by default, for what this rank holds alone. It starts
    as the whole one does from `seed`; or `fill(weights, cut)` writes weights, some at a time, that it is given by name,
    where `cut` says what part they are of the whole one's: such as `load_weights` of llmsys.models.

    Errors     ValueError for a plan or a layout that does not fit the model, of the part that found it; for a model on
               the meta device without seed or fill, or another with them
    """
    # What does not fit the whole model is an error on every rank, whatever part of the model it is in.
    styles, again = _read(plan, model, mesh, recompute)
    pipeline = Pipeline(
        *(model, plan["stages"], mesh.pp), schedule=schedule, chunks_per_stage=chunks_per_stage, costs=costs
    )
    here = {name for name, _ in model.named_modules()}
    styles = {name: style for name, style in styles.items() if name in here}
    cut = tensor.cut(model, styles, mesh.tp)
    initial = _initial(model, cut, device, seed, fill)
    tensor.hook(*(model, styles, mesh.tp, cut), sequence_parallel=sequence_parallel, overlap_chunks=overlap_chunks)
    memory.recompute(model, [name for name in again if name in here])
    chunks = [nn.ModuleList(run) for run in pipeline.blocks.values()]
    apart = {2: chunks if len(chunks) > 1 else [], 3: model.get_submodule(plan["stages"]).children()}
    flat = Zero(
        *(model, mesh),
        stage=zero,
        units=apart.get(zero, []),
        bucket_bytes=bucket_bytes,
        master_dtype=master_dtype,
        reduce_dtype=reduce_dtype,
        offload=offload,
        group_of=group_of,
        shared=pipeline.shared,
        fill=initial,
    )
    if initial is not None:
        _fill_rest(model, initial)
    return Parallel(model, mesh, pipeline, cut, flat, mesh.tp.size if sequence_parallel else 1)


def _read(plan: Mapping[str, Any], model: nn.Module, mesh: Mesh, recompute: str) -> tuple[dict[str, str], list[str]]:
    """How each module of the whole model is cut, and those that backward computes again."""
    where = "llmsys.parallel.parallelize"
    for part in ("tensor", "stages"):
        if part not in plan:
            raise ValueError(f"{where}: a plan of {', '.join(plan) or 'nothing'}, expected one that says {part!r}")
    blocks = [name for name, _ in model.named_modules() if name.rpartition(".")[0] == plan["stages"]]
    patterns = {"none": [], "selective": plan.get("recompute", []), "full": blocks}
    if recompute not in patterns:
        raise ValueError(f"{where}: recompute={recompute!r}, expected one of {', '.join(patterns)}")
    return tensor.check(model, plan["tensor"], mesh.tp), matched(model, patterns[recompute])


def _initial(
    model: Any, cut: Mapping[str, Shard], device: torch.device | str | None, seed: int | None, fill: Fill | None
) -> Callable[[Mapping[str, Tensor]], None] | None:
    """What fills the weights of a model on the meta device, which is now on `device`, without memory yet; else None."""
    where = "llmsys.parallel.parallelize"
    tensors = [*model.named_parameters(), *model.named_buffers()]
    without = [name for name, each in tensors if each.is_meta]
    if not without:
        for option, value in {"device": device, "seed": seed, "fill": fill}.items():
            if value is not None:
                raise ValueError(
                    f"{where}: {option}={value} for a model that has memory, expected one on the meta device"
                )
        return None
    if len(without) < len(tensors):
        raise ValueError(f"{where}: {without[0]} is on the meta device and others are not, expected all of them there")
    for name, _ in model.named_buffers():
        raise ValueError(f"{where}: {name} is a buffer on the meta device, expected parameters alone there")
    if (seed is None) == (fill is None):
        raise ValueError(f"{where}: a model on the meta device with seed={seed} and fill={fill}, expected one of them")
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                empty = torch.empty_like(parameter, device=device or "cpu", requires_grad=False)
                empty.untyped_storage().resize_(0)
                made[parameter] = nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, made[parameter])
    if fill is not None:
        return lambda weights: fill(weights, cut)
    return lambda weights: model.initialise(seed, cut, weights)


def _fill_rest(model: nn.Module, initial: Callable[[Mapping[str, Tensor]], None]) -> None:
    """What ZeRO does not hold: frozen parameters."""
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        if not parameter.requires_grad and storage.nbytes() < parameter.nbytes:
            storage.resize_(parameter.nbytes)
            initial({name: parameter.data})
