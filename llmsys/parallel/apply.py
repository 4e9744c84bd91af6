"""A model for one process made into this rank's part of it: the one place that knows in which order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import memory
from llmsys.parallel import tensor
from llmsys.parallel.grad_norm import clip_grad_norm
from llmsys.parallel.mesh import Mesh
from llmsys.parallel.pipeline import Pipeline
from llmsys.parallel.zero import BUCKET_BYTES, Zero

Fill = Callable[[Any, Mapping[str, tensor.Shard]], None]


class Parallel:
    """What `parallelize` gives: this rank's part of a model, and the steps of its training.

    optimizer = AdamW(parallel.shards())
    loss = parallel.backward(microbatches)      # gradients: of the mean over all microbatches of all ranks
    norm = parallel.clip_grad_norm(1.0)
    optimizer.step()
    parallel.gather()                           # every rank has what the others updated
    """

    def __init__(self, model: nn.Module, mesh: Mesh, pipeline: Pipeline, cut: Mapping[str, tensor.Shard], zero: Zero):
        self.model, self.mesh, self.pipeline, self.cut, self.zero = model, mesh, pipeline, cut, zero
        self.shards, self.gather, self.whole = zero.shards, zero.gather, zero.whole

    def backward(self, micros: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean loss of this rank's microbatches (tokens, targets), which all ranks of pp and tp are given alike."""
        loss = self.pipeline.step(micros, accumulating=self.zero.accumulating, holding=self.zero.holding)
        self.zero.reduce()
        return loss

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
    group_of: Callable[[str, nn.Parameter], Hashable] = lambda name, parameter: None,
) -> Parallel:
    """Keep of `model` what this rank holds, by `plan`, and hook in what it says to others.

    plan       as beside each model: "tensor", patterns of modules and how each is cut; "stages", the name of its
               blocks; "recompute", patterns of modules
    recompute  what backward computes again: "none", "selective" (what the plan says) or "full" (each block)

    A model on the meta device gets memory on `device`, the CPU by default, for what this rank holds alone. It starts
    as the whole one does from `seed`, or as `fill(model, cut)` leaves it, such as `load_weights` of llmsys.models.

    Errors     ValueError for a plan or a layout that does not fit the model, of the part that found it; for a model on
               the meta device without seed or fill, or another with them
    """
    pipeline = Pipeline(
        *(model, plan["stages"], mesh.pp), schedule=schedule, chunks_per_stage=chunks_per_stage, costs=costs
    )
    cut = tensor.cut(model, plan["tensor"], mesh.tp)
    _initialise(model, cut, device, seed, fill)
    tensor.hook(
        *(model, plan["tensor"], mesh.tp, cut), sequence_parallel=sequence_parallel, overlap_chunks=overlap_chunks
    )
    patterns = {"none": [], "selective": plan.get("recompute", []), "full": pipeline.names}
    if recompute not in patterns:
        raise ValueError(f"llmsys.parallel.parallelize: recompute={recompute!r}, expected one of {', '.join(patterns)}")
    memory.recompute(model, patterns[recompute])
    flat = Zero(
        *(model, mesh),
        stage=zero,
        units=model.get_submodule(plan["stages"]).children(),
        bucket_bytes=bucket_bytes,
        master_dtype=master_dtype,
        reduce_dtype=reduce_dtype,
        group_of=group_of,
        shared=pipeline.shared,
    )
    return Parallel(model, mesh, pipeline, cut, flat)


def _initialise(
    model: Any, cut: Mapping[str, tensor.Shard], device: torch.device | str | None, seed: int | None, fill: Fill | None
) -> None:
    """Memory for what is kept, and what is in it."""
    where = "llmsys.parallel.parallelize"
    without = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    given = {"device": device, "seed": seed, "fill": fill}
    if not without:
        for option, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{where}: {option}={value} for a model that has memory, expected one on the meta device"
                )
        return
    if len(without) < len(list(model.parameters())):
        raise ValueError(f"{where}: {without[0]} is on the meta device and others are not, expected all of them there")
    if (seed is None) == (fill is None):
        raise ValueError(f"{where}: a model on the meta device with seed={seed} and fill={fill}, expected one of them")
    model.to_empty(device=device or "cpu")
    if fill is not None:
        fill(model, cut)
    else:
        model.initialise(seed, cut)
