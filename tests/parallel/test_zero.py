"""Data parallelism and ZeRO: three steps end in the weights that one process has on the whole batch."""

import itertools
import sys

import pytest
import torch

from llmsys import parallel
from llmsys.models.llama import Llama, LlamaConfig
from llmsys.parallel import Mesh, collectives
from llmsys.parallel.zero import Zero
from tests.parallel.ranks import run

SHAPE = LlamaConfig(vocab_size=32, dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, hidden_dim=20)
TIED = LlamaConfig(**{**vars(SHAPE), "tied_head": True})
STEPS, ROWS = 3, 12


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(32, (2, ROWS, 5), generator=generator) for _ in range(STEPS)]


def optimizer(groups):
    return torch.optim.AdamW([{"params": params, "weight_decay": decay} for decay, params in groups], lr=1e-2)


def decay_of(name, parameter):
    return 0.0 if "norm" in name else 0.1


def alone(shape):
    model = Llama(shape, dtype=torch.float64)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    groups = [(decay, [p for n, p in model.named_parameters() if decay_of(n, p) == decay]) for decay in (0.0, 0.1)]
    adamw, losses = optimizer(groups), []
    for tokens, targets in batches():
        losses.append(model.loss(tokens, targets))
        losses[-1].backward()
        adamw.step()
        adamw.zero_grad()
    return [loss.item() for loss in losses], model.state_dict()


def shared(shape, sizes, stage, micros, bucket_bytes, unused):
    mesh = parallel.connect(**sizes)
    model = Llama(shape, dtype=torch.float64)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    if unused:
        model.unused = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
    zero = Zero(model, mesh, stage=stage, units=model.blocks, bucket_bytes=bucket_bytes, group_of=decay_of)
    adamw, losses = optimizer([(decay, zero.shards(decay)) for decay in (0.0, 0.1)]), []
    held = sum(shard.numel() for decay in (0.0, 0.1) for shard in zero.shards(decay))
    for batch in batches():
        mine = batch.chunk(mesh.data.size, 1)[mesh.data.rank]
        total = 0.0
        for index, (tokens, targets) in enumerate(zip(*(x.chunk(micros) for x in mine), strict=True)):
            loss = model.loss(tokens, targets) / micros
            if index + 1 < micros:
                with zero.accumulating():
                    loss.backward()
            else:
                loss.backward()
            total += loss.item()
        zero.reduce()
        adamw.step()
        zero.gather()
        losses.append(total)
    with zero.whole():
        if unused:  # its gradient is zero: it decays
            torch.testing.assert_close(model.unused.detach(), torch.full((7,), (1 - 1e-2 * 0.1) ** STEPS).double())
        return losses, {name: weight.clone() for name, weight in model.state_dict().items()}, held


LAYOUTS = [{"dp": 2}, {"dp": 3}, {"dp": 4, "shard": 2}, {"dp": 2, "cp": 2}]
CASES = [
    *itertools.product([TIED], LAYOUTS, [0, 1, 2, 3], [1], [400], [False]),
    *itertools.product([SHAPE], [{"dp": 2}], [0, 1, 2, 3], [2, 3], [1, 1 << 20], [True]),
]


@pytest.mark.parametrize("shape, sizes, stage, micros, bucket_bytes, unused", CASES, ids=lambda value: str(value)[-28:])
def test_equals_one_process(shape, sizes, stage, micros, bucket_bytes, unused):
    losses, weights = alone(shape)
    found = run(Mesh(**sizes).size, shared, shape, sizes, stage, micros, bucket_bytes, unused)
    mean = torch.tensor([each[0] for each in found], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10)
    for _, theirs, _ in found:
        for name, weight in weights.items():
            torch.testing.assert_close(
                theirs[name], weight, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name} {text}"
            )
    numel = sum(weight.numel() for name, weight in weights.items() if name != "blocks.0.mlp.up.weight")
    parts = Mesh(**sizes).shard.size if stage else 1
    padding = parts * 40 + 7
    assert all(numel // parts <= held <= numel // parts + padding for *_, held in found)


def traffic(stage, sizes):
    mesh = parallel.connect(**sizes)
    model = Llama(SHAPE, dtype=torch.float64)
    zero = Zero(model, mesh, stage=stage)
    tokens, targets = batches()[0]
    with parallel.counted() as sent:
        model.loss(tokens, targets).backward()
        zero.reduce()
        zero.gather()
    return dict(sent), 8 * sum(flat.bucket.size for flat in zero._flats), sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_traffic(stage):
    """2·(N − 1)/N of the parameters, whatever the stage."""
    for sent, padded, num_bytes in run(3, traffic, stage, {"dp": 3}):
        assert sum(sent.values()) == pytest.approx(2 * num_bytes * 2 / 3, rel=0.01)
        assert set(sent) == {"data" if stage == 0 else "shard"}
        assert padded >= num_bytes


def test_traffic_of_copies():
    for sent, padded, _ in run(4, traffic, 2, {"dp": 4, "shard": 2}):
        assert sent == {"shard": padded, "copies": padded // 2}


def test_errors():
    with pytest.raises(ValueError, match="stage=4, expected 0, 1, 2 or 3"):
        Zero(torch.nn.Linear(2, 2), Mesh(), stage=4)
    with pytest.raises(ValueError, match="unit 1, a ReLU, expected modules of the Linear"):
        Zero(model := torch.nn.Linear(2, 2), Mesh(), stage=3, units=[model, torch.nn.ReLU()])
    with pytest.raises(ValueError, match="no parameter asks for a gradient"):
        Zero(torch.nn.ReLU(), Mesh(), stage=1)


def places_of_gradients():
    """Where, as its message would say, each sum of a gradient was asked for."""
    mesh = parallel.connect(dp=2)
    model = Llama(SHAPE, dtype=torch.float64)
    zero = Zero(model, mesh, stage=0, bucket_bytes=400)
    seen, wait = [], collectives.Pending.wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.Pending, "wait", lambda pending: seen.append(pending.place) or wait(pending))
        loss = model.loss(*batches()[0])
        line = sys._getframe().f_lineno + 1
        loss.backward()
        for flat in zero._flats:
            flat.finish_reduce()
    assert len(seen) == len(zero._flats) > 3 and set(seen) == {f"{__file__}:{line}"}, seen


def test_a_gradients_call_site_is_the_backwards():
    run(2, places_of_gradients)
