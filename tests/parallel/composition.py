"""Three steps of training in a layout beside the same on one process, on the CPU: how far apart they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from llmsys.models import gpt2, llama
from llmsys.parallel import connect, parallelize
from llmsys.parallel.schedule import SCHEDULES
from llmsys.parallel.shard import Shard
from tests.parallel.layouts import MESH, OPTIONS, ROWS, Layout, size_of
from tests.parallel.ranks import run

TOLERANCE = 1e-10  # of `errors`
STEPS, LENGTH, VOCAB, MAX_NORM = 3, 8, 32, 0.05


def a_llama(num_layers: int, *, tied_head: bool) -> nn.Module:
    sizes = {"dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "hidden_dim": 24}
    config = llama.LlamaConfig(vocab_size=VOCAB, num_layers=num_layers, tied_head=tied_head, **sizes)
    return llama.Llama(config, dtype=torch.float64)


def a_gpt2(num_layers: int, *, dropout: float) -> nn.Module:
    sizes = {"dim": 16, "num_heads": 4, "max_sequence_length": LENGTH + 1, "dropout": dropout}
    return gpt2.GPT2(gpt2.GPT2Config(vocab_size=VOCAB, num_layers=num_layers, **sizes), dtype=torch.float64)


# Name → a model of that many layers, in float64, and its plan.
MODELS: dict[str, tuple[Callable[[int], nn.Module], dict]] = {
    "llama": (partial(a_llama, tied_head=True), llama.PLAN),
    "llama-untied": (partial(a_llama, tied_head=False), llama.PLAN),
    "gpt2": (partial(a_gpt2, dropout=0.0), gpt2.PLAN),
    "gpt2-dropout": (partial(a_gpt2, dropout=0.2), gpt2.PLAN),
}


@dataclass
class Alone:
    """What one process finds."""

    losses: Tensor
    norms: Tensor
    gradients: list[dict[str, Tensor]]  # of each step, before they are clipped
    weights: dict[str, Tensor]


@dataclass
class Part:
    """What one rank finds. Of what `cut` is of a gradient it has a part, flat, from some element on."""

    losses: Tensor
    norms: Tensor
    gradients: list[dict[str, tuple[int, Tensor]]]
    weights: dict[str, tuple[int, Tensor]]
    cut: dict[str, Shard]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (2, ROWS, LENGTH), generator=generator) for _ in range(STEPS)]


def num_layers(layout: Layout) -> int:
    """One more than there are chunks: no stage has as many as another."""
    return 1 + max(4, layout["pp"] * (SCHEDULES[layout["schedule"]].chunks_per_stage or 2))


@cache
def alone(name: str, layers: int, micros: int) -> Alone:
    model = MODELS[name][0](layers)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms, gradients = [], [], []
    for step, batch in enumerate(batches()):
        losses.append(torch.zeros((), dtype=torch.float64))
        for micro, (tokens, targets) in enumerate(zip(*(x.chunk(micros) for x in batch), strict=True)):
            model.at(step, micro)
            loss = model.loss(tokens, targets) / micros
            loss.backward()
            losses[-1] += loss.detach()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        adamw.step()
        adamw.zero_grad()
    return Alone(torch.stack(losses), torch.stack(norms), gradients, model.state_dict())


def in_parts(layout: Layout, device: str) -> Part:
    mesh = connect(**mesh_sizes(layout), device=device, timeout_s=120.0)
    build, plan = MODELS[layout["model"]]
    with torch.device("meta" if layout["meta"] else device):
        model = build(num_layers(layout))
    parallel = parallelize(
        *(model, plan, mesh),
        chunks_per_stage=None if SCHEDULES[layout["schedule"]].chunks_per_stage else 2,
        bucket_bytes=2000,
        **({"seed": 0, "device": device} if layout["meta"] else {}),
        **{name: layout[name] for name in OPTIONS},
    )
    adamw, losses, norms, gradients = torch.optim.AdamW(parallel.shards(), lr=1e-2), [], [], []
    for batch in batches():
        mine = batch.to(device).chunk(mesh.data.size, 1)[mesh.data.rank]
        micros = list(zip(*(x.chunk(layout["micros"]) for x in mine), strict=True))
        losses.append(parallel.backward(micros))
        gradients.append(
            {piece.name: (start, part.to("cpu", copy=True)) for piece, start, part in parallel.zero.gradients()}
        )
        norms.append(parallel.clip_grad_norm(MAX_NORM))
        adamw.step()
        parallel.gather()
    with parallel.whole():
        weights = {name: (0, weight.flatten().to("cpu", copy=True)) for name, weight in model.state_dict().items()}
    return Part(torch.stack(losses).cpu(), torch.stack(norms).cpu(), gradients, weights, parallel.cut)


def mesh_sizes(layout: Layout) -> dict[str, int]:
    """As `connect` is told them."""
    sizes = {name: layout[name] for name in MESH}
    sizes["dp"] = sizes.pop("replicate") * sizes["shard"]
    return sizes


def errors(layout: Layout, device: str = "cpu") -> dict[str, float]:
    """The largest difference of losses, norms, gradients and weights, as a share of the largest value of each tensor.

    Every element of every gradient and weight must be on some rank. NaN where something is.
    """
    # What is dropped of a microbatch is the same in every layout that has the same ones.
    micros = layout["micros"] * layout["replicate"] * layout["shard"] if "dropout" in layout["model"] else 1
    one = alone(layout["model"], num_layers(layout), micros)
    parts = run(size_of(layout), in_parts, layout, device, backend="nccl" if device == "cuda" else "gloo")
    found = {
        "losses": [_apart(torch.stack([part.losses for part in parts]).mean(0), one.losses)],
        "norms": [_apart(part.norms, one.norms) for part in parts],
        "gradients": [],
        "weights": _compare(one.weights, [(part.cut, part.weights) for part in parts]),
    }
    for step, gradients in enumerate(one.gradients):
        found["gradients"] += _compare(gradients, [(part.cut, part.gradients[step]) for part in parts])
    return {name: torch.stack(each).max().item() for name, each in found.items()}


def _compare(
    whole: dict[str, Tensor], parts: list[tuple[dict[str, Shard], dict[str, tuple[int, Tensor]]]]
) -> list[Tensor]:
    """How far each part is from what it is a part of."""
    held = {name: torch.zeros(x.numel(), dtype=torch.bool) for name, x in whole.items()}
    found = []
    for cut, tensors in parts:
        for name, (start, x) in tensors.items():
            places = torch.arange(whole[name].numel()).view(whole[name].shape)
            places = (cut[name].of(places) if name in cut else places).flatten()[start : start + x.numel()]
            held[name][places] = True
            if x.numel():
                found.append(_apart(x, whole[name].flatten()[places], whole[name]))
    missing = [name for name, mask in held.items() if not mask.all()]
    assert not missing, f"no rank has all of {', '.join(missing)}"
    return found


def _apart(found: Tensor, expected: Tensor, whole: Tensor | None = None) -> Tensor:
    assert found.shape == expected.shape, f"{tuple(found.shape)} for {tuple(expected.shape)}"
    return (found - expected).abs().max() / (expected if whole is None else whole).abs().max()
