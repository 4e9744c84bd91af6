"""Any layout ends in the weights of one process: pipeline, tensor and sequence parallel, data parallel, ZeRO."""

import pytest
import torch

from llmsys import parallel
from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, tensor
from llmsys.parallel.pipeline import Pipeline
from llmsys.parallel.zero import Zero
from tests.parallel.ranks import run

TIED = LlamaConfig(
    vocab_size=32, dim=16, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=24, tied_head=True
)
STEPS, ROWS, LENGTH = 3, 8, 8


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(32, (2, ROWS, LENGTH), generator=generator) for _ in range(STEPS)]


def alone():
    model = Llama(TIED, dtype=torch.float64)
    adamw, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for tokens, targets in batches():
        loss = model.loss(tokens, targets)
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def in_parts(sizes, schedule, stage, micros, sequence_parallel):
    mesh = parallel.connect(**sizes)
    model = Llama(TIED, dtype=torch.float64)
    pipeline = Pipeline(
        model, PLAN["stages"], mesh.pp, schedule=schedule, chunks_per_stage=2 if "interleaved" in schedule else None
    )
    shards = tensor.apply(model, PLAN["tensor"], mesh.tp, sequence_parallel=sequence_parallel)
    zero = Zero(model, mesh, stage=stage, bucket_bytes=2000, shared=pipeline.shared)
    adamw, losses = torch.optim.AdamW(zero.shards(), lr=1e-2), []
    for batch in batches():
        tokens, targets = batch.chunk(mesh.data.size, 1)[mesh.data.rank]
        pairs = list(zip(tokens.chunk(micros), targets.chunk(micros), strict=True))
        losses.append(pipeline.step(pairs, accumulating=zero.accumulating).item())
        zero.reduce()
        adamw.step()
        zero.gather()
    return losses, model.state_dict(), shards


# Sizes, schedule, ZeRO stage, microbatches, sequence parallel: every pair of what there is, and all of it on 8 ranks.
CASES = [
    ({"tp": 2, "dp": 2}, "1f1b", 0, 2, True),
    ({"tp": 2, "dp": 2}, "gpipe", 1, 1, False),
    ({"tp": 4}, "gpipe", 2, 2, True),
    ({"pp": 2, "dp": 2}, "1f1b", 2, 2, False),
    ({"pp": 2, "dp": 2}, "interleaved_1f1b", 1, 4, False),
    ({"pp": 4}, "1f1b", 0, 8, False),
    ({"pp": 2, "tp": 2}, "interleaved_1f1b", 2, 4, True),
    ({"pp": 2, "tp": 2}, "gpipe", 1, 2, False),
    ({"tp": 2, "dp": 4, "shard": 2}, "1f1b", 2, 2, True),
    ({"pp": 2, "tp": 2, "dp": 2}, "1f1b", 2, 4, True),
    ({"pp": 2, "tp": 2, "dp": 2}, "interleaved_1f1b", 1, 2, True),
]


@pytest.mark.parametrize("sizes, schedule, stage, micros, sequence_parallel", CASES, ids=str)
def test_equals_one_process(sizes, schedule, stage, micros, sequence_parallel):
    losses, weights = alone()
    found = run(Mesh(**sizes).size, in_parts, sizes, schedule, stage, micros, sequence_parallel)
    mean = torch.tensor([each[0] for each in found], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10)
    for _, theirs, shards in found:
        for name, weight in theirs.items():
            expected = shards[name].of(weights[name]) if name in shards else weights[name]
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-10, msg=lambda t, name=name: f"{name} {t}")
    assert set().union(*(theirs for _, theirs, _ in found)) == weights.keys()
