"""What a trainer trains with in a job of ranks: each holds a part of the model, or a part of the batch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsys.models.llama import PLAN, Llama
from llmsys.optim import AdamW
from llmsys.parallel import Mesh, Parallel, parallelize
from llmsys.parallel.collectives import all_reduce
from llmsys.parallel.grad_norm import grad_norm
from llmsys.train.config import TrainConfig
from llmsys.train.engine import Batch, Engine
from llmsys.train.parts_checkpoint import PartsCheckpoint

# A log's names of axes, and those of the mesh that each is made of; norms and the like, over several, are "other".
AXES = {"pp": ("pp",), "dp": ("replicate", "shard", "dp", "data", "copies"), "tp": ("tp",), "other": ()}
AXIS_OF = {part: axis for axis, parts in AXES.items() for part in parts}


@dataclass(frozen=True)
class RanksEngine(Engine):
    """This rank's part of what trains."""

    parallel: Parallel
    checkpoint: PartsCheckpoint
    micros: int  # of each batch
    device: torch.device

    axes = tuple(AXES)

    @property
    def first(self) -> bool:  # type: ignore[override]
        return self.parallel.mesh.rank == 0

    def backward(self, batches: Sequence[Batch]) -> float:
        return self._mean(self.parallel.backward([micro for batch in batches for micro in self._micros(batch)]))

    def update(self, grad_scale: Tensor | None) -> None:
        self.parallel.step(self.optimizer, grad_scale=grad_scale)

    def evaluate(self, batch: Batch) -> float:
        return self._mean(self.parallel.evaluate(self._micros(batch)))

    def any(self, flag: bool) -> bool:
        return totals(self.parallel.mesh, self.device, flag)[0] > 0

    def sent(self, counter: Counter[str]) -> dict[str, int]:
        mine = Counter(dict.fromkeys(AXES, 0))
        for part, num_bytes in counter.items():
            mine[AXIS_OF.get(part, "other")] += num_bytes
        sums = totals(self.parallel.mesh, self.device, *mine.values())
        return {axis: int(number) for axis, number in zip(mine, sums, strict=True)}

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
        return self.checkpoint.save(folder, step, state, keep)

    def load(self, path: Path) -> dict[str, Any]:
        return self.checkpoint.load(path)

    def _micros(self, batch: Batch) -> list[Batch]:
        tokens_BT, targets_BT = batch
        return list(zip(tokens_BT.chunk(self.micros), targets_BT.chunk(self.micros), strict=True))

    def _mean(self, loss: Tensor) -> float:
        data = self.parallel.mesh.data
        return all_reduce(loss.double().view(1), data).item() / data.size


def engine(config: TrainConfig, dtype: torch.dtype, mesh: Mesh) -> RanksEngine:
    """What `trainer.fused` is in one process; `config.device` is this rank's.

    Errors     ValueError for a layout that the model cannot be cut by
    """
    parallel, c = in_parts(config, dtype, mesh, config.device), config.optimizer
    groups = [
        {"params": parallel.shards("matrices"), "weight_decay": c.weight_decay},
        {"params": parallel.shards("norms"), "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    whole = Llama(config.model, device="meta")
    shapes = {name: tuple(weight.shape) for name, weight in whole.named_parameters()}
    device = torch.device(config.device)
    return RanksEngine(
        *(parallel.model, optimizer, partial(_clip, parallel)),  # type: ignore[arg-type]
        parallel=parallel,
        checkpoint=PartsCheckpoint(parallel, optimizer, shapes, device),
        micros=config.parallel.micros,
        device=device,
    )


def totals(mesh: Mesh, device: torch.device | str, *numbers: float) -> list[float]:
    """The sum of each over all ranks."""
    return all_reduce(torch.tensor(numbers, dtype=torch.float64, device=device), mesh.world).tolist()


def in_parts(config: TrainConfig, dtype: torch.dtype, mesh: Mesh, device: str) -> Parallel:
    """The model, cut by the config's layout."""
    p = config.parallel
    return parallelize(
        *(Llama(config.model, device="meta", dtype=dtype), PLAN, mesh),
        device=device,
        seed=config.seed,
        zero=p.zero,
        schedule=p.schedule,
        chunks_per_stage=p.chunks_per_stage,
        sequence_parallel=p.sequence_parallel,
        overlap_chunks=p.overlap_chunks,
        recompute=p.recompute,
        offload=p.offload,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        group_of=lambda name, weight: "matrices" if weight.dim() > 1 else "norms",
    )


def _clip(parallel: Parallel, parameters: Iterable[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """As `llmsys.optim.clip_grad_norm`, of all parameters on all ranks."""
    norm = grad_norm(parallel.zero, parallel.mesh, parallel.cut)
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)
