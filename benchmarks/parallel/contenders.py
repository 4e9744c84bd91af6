"""Who trains the same model on the same ranks: llmsys, and what PyTorch has for each way to be parallel.

Every peer is set up as its documentation advises for speed and memory: DistributedDataParallel with gradients that are
views of its buckets, FSDP2 on each block and on the rest, pipelines without outputs, and DTensor by the plan of
torchtitan for Llama, whose loss is parallel too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as pipelining
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.parallel.model import Llama, mean_cross_entropy
from llmsys import models
from llmsys.models.llama import PLAN, LlamaConfig
from llmsys.parallel import connect, parallelize, tensor as tp

OURS, OUR_KERNELS = "llmsys", "llmsys, its own kernels"
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained: `rows` sequences of `length` tokens in all each step, which a pipeline takes in `micros`."""

    config: LlamaConfig
    rows: int
    length: int
    micros: int
    dtype: torch.dtype = torch.float32

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return models.Llama(self.config, dtype=self.dtype).to(dtype or self.dtype).state_dict()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets."""
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(self.config.vocab_size, (self.rows, self.length + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A way to be parallel, along the `axis` alone: how a peer does it, and the options with which llmsys does."""

    name: str
    axis: str  # of the mesh: "dp", "pp" or "tp"
    peer: str
    build: Callable[[Setting], Training]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """A contender on one rank. A step is `backward`, then `update`.

    backward    this rank's mean loss, None where it is not known; gradients are then those of all ranks' mean loss
    gradients   after it: name, what this rank knows of the gradient, and which part of it that is, None for all
    """

    backward: Callable[[Tensor, Tensor], Tensor | None]
    update: Callable[[], None]
    gradients: Callable[[], Iterator[tuple[str, Tensor, tp.Shard | None]]]


def train(contender: str, pair: Pair, setting: Setting) -> Training:
    """The contender, on this rank of the job."""
    if contender == pair.peer:
        return pair.build(setting)
    return ours(models.Llama if contender == OUR_KERNELS else Llama, pair, setting)


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def part(batch: Tensor) -> Tensor:
    """This rank's rows."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


# ---- llmsys ----


def ours(kind: type[nn.Module], pair: Pair, setting: Setting) -> Training:
    mesh = connect(**{pair.axis: dist.get_world_size()})
    if kind is Llama:
        model: nn.Module = Llama(setting.config, setting.weights())
    else:
        model = models.Llama(setting.config, dtype=setting.dtype)
    parallel = parallelize(model, PLAN, mesh, **pair.options)
    optimizer = adamw(parallel.shards())
    micros = setting.micros if pair.axis == "pp" else 1

    def backward(tokens: Tensor, targets: Tensor) -> Tensor:
        if pair.axis == "dp":
            tokens, targets = part(tokens), part(targets)
        return parallel.backward(list(zip(tokens.chunk(micros), targets.chunk(micros), strict=True)))

    def update() -> None:
        optimizer.step()
        parallel.gather()

    def gradients() -> Iterator[tuple[str, Tensor, tp.Shard | None]]:
        # Copies: of a view, all that lies behind it would be sent.
        held: list[Any] = [[(piece.name, found.clone()) for piece, _, found in parallel.zero.gradients()]]
        if parallel.zero.owners.size > 1:
            held *= parallel.zero.owners.size
            dist.all_gather_object(held, held[0])
        for pieces in zip(*held, strict=True):
            name = pieces[0][0]
            yield name, torch.cat([piece for _, piece in pieces]), parallel.cut.get(name)

    return Training(backward, update, gradients)


# ---- peers ----


def _training(modules: Mapping[str, nn.Module], backward: Callable[[Tensor, Tensor], Tensor | None]) -> Training:
    """`modules` by the prefix that their names have and the model's do not."""
    named = [
        (name.removeprefix(prefix), parameter)
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    ]
    groups: dict[type, list[Tensor]] = {}  # the fused AdamW takes no list in which some are DTensors
    for _, parameter in named:
        groups.setdefault(type(parameter.data), []).append(parameter)
    optimizer = adamw([{"params": parameters} for parameters in groups.values()])

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def gradients() -> Iterator[tuple[str, Tensor, tp.Shard | None]]:
        for name, parameter in named:
            assert parameter.grad is not None
            yield name, parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad, None

    return Training(backward, update, gradients)


def _data_parallel(module: nn.Module, prefix: str = "") -> Training:
    def backward(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = mean_cross_entropy(module(part(tokens)), part(targets))
        loss.backward()
        return loss.detach()

    return _training({prefix: module}, backward)


def ddp(setting: Setting) -> Training:
    model = Llama(setting.config, setting.weights())
    return _data_parallel(DistributedDataParallel(model, gradient_as_bucket_view=True), "module.")


def fsdp(reshard_after_forward: bool, setting: Setting) -> Training:
    model = Llama(setting.config, setting.weights())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return _data_parallel(model)


def pipeline(schedule: Any, setting: Setting) -> Training:
    """Blocks dealt evenly: one run a rank, or two, which go round, or down and up again under ZBV."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = {
        pipelining.Schedule1F1B: [rank],
        pipelining.ScheduleInterleaved1F1B: [rank, size + rank],
        pipelining.ScheduleZBVZeroBubble: [rank, 2 * size - 1 - rank],
    }[schedule]
    num_stages = size * len(own)
    stages = [
        pipelining.PipelineStage(_stage(setting, stage, num_stages), stage, num_stages, torch.device("cpu"))
        for stage in own
    ]
    run = schedule(stages if len(own) > 1 else stages[0], setting.micros, loss_fn=mean_cross_entropy)
    first, last = 0 in own, num_stages - 1 in own

    def backward(tokens: Tensor, targets: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        given = {"target": targets, "losses": losses} if last else {}
        run.step(*([tokens] if first else []), return_outputs=False, **given)
        return torch.stack(losses).detach().mean() if last else None

    return _training({f"{i}": stage.submod for i, stage in enumerate(stages)}, backward)


def _stage(setting: Setting, stage: int, num_stages: int) -> nn.Module:
    model = Llama(setting.config, setting.weights())
    count = setting.config.num_layers // num_stages
    model.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in range(stage * count, (stage + 1) * count)})
    if stage > 0:
        model.embedding = None
    if stage < num_stages - 1:
        model.norm = model.head = None
    return model


def dtensor(sequence_parallel: bool, setting: Setting) -> Training:
    model = Llama(setting.config, setting.weights())
    between = Shard(1) if sequence_parallel else Replicate()
    norm = {"norm": SequenceParallel()} if sequence_parallel else {}
    enter = PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate())
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
        **norm,
    }
    for i in range(setting.config.num_layers):
        plan |= {f"blocks.{i}.{name}": enter for name in ("attention", "mlp")}
        plan |= {f"blocks.{i}.{kind}_{name}": style for kind in ("attention", "mlp") for name, style in norm.items()}
        plan |= {f"blocks.{i}.attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
        plan |= {f"blocks.{i}.mlp.{name}": ColwiseParallel() for name in ("gate", "up")}
        for name in ("attention.wo", "mlp.down"):
            plan[f"blocks.{i}.{name}"] = RowwiseParallel(output_layouts=between)
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)

    def backward(tokens: Tensor, targets: Tensor) -> Tensor:
        with loss_parallel():
            loss = mean_cross_entropy(model(tokens), targets)
            loss.backward()
        return loss.detach().full_tensor()

    return _training({"": model}, backward)


PAIRS = (
    Pair(name="data parallel", axis="dp", peer="DistributedDataParallel", build=ddp, options={"zero": 0}),
    Pair(
        name="ZeRO 2", axis="dp", peer="FSDP2, not resharded after forward", build=partial(fsdp, False),
        options={"zero": 2},
    ),
    Pair(name="ZeRO 3", axis="dp", peer="FSDP2", build=partial(fsdp, True), options={"zero": 3}),
    Pair(
        name="1F1B", axis="pp", peer="Schedule1F1B", build=partial(pipeline, pipelining.Schedule1F1B),
        options={"schedule": "1f1b"},
    ),
    Pair(
        name="interleaved 1F1B", axis="pp", peer="ScheduleInterleaved1F1B",
        build=partial(pipeline, pipelining.ScheduleInterleaved1F1B),
        options={"schedule": "interleaved_1f1b", "chunks_per_stage": 2},
    ),
    Pair(
        name="ZB-V", axis="pp", peer="ScheduleZBVZeroBubble",
        build=partial(pipeline, pipelining.ScheduleZBVZeroBubble), options={"schedule": "zb_v"},
    ),
    Pair(name="tensor", axis="tp", peer="DTensor", build=partial(dtensor, False)),
    Pair(
        name="tensor and sequence", axis="tp", peer="DTensor, sequence parallel", build=partial(dtensor, True),
        options={"sequence_parallel": True},
    ),
)  # fmt: skip
