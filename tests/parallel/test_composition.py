"""Any layout ends in the weights of one process: pipeline, tensor and sequence parallel, data parallel, ZeRO."""

import pytest
import torch

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, connect, parallelize
from tests.parallel.ranks import run

TIED = LlamaConfig(
    vocab_size=32, dim=16, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=24, tied_head=True
)
STEPS, ROWS, LENGTH, MAX_NORM = 3, 8, 8, 0.05
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(32, (2, ROWS, LENGTH), generator=generator) for _ in range(STEPS)]


def alone():
    model = Llama(TIED, dtype=torch.float64)
    adamw, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2), [], []
    for tokens, targets in batches():
        losses.append(model.loss(tokens, targets))
        losses[-1].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        adamw.step()
        adamw.zero_grad()
    return torch.stack(losses).detach(), torch.stack(norms), model.state_dict()


def in_parts(sizes, schedule, zero, micros, sequence_parallel):
    mesh = connect(**sizes)
    model = Llama(TIED, dtype=torch.float64)
    parallel = parallelize(
        *(model, PLAN, mesh),
        zero=zero,
        schedule=schedule,
        chunks_per_stage=2 if "interleaved" in schedule else None,
        sequence_parallel=sequence_parallel,
        bucket_bytes=2000,
    )
    adamw, losses, norms = torch.optim.AdamW(parallel.shards(), lr=1e-2), [], []
    for batch in batches():
        tokens, targets = batch.chunk(mesh.data.size, 1)[mesh.data.rank]
        losses.append(parallel.backward(list(zip(tokens.chunk(micros), targets.chunk(micros), strict=True))))
        norms.append(parallel.clip_grad_norm(MAX_NORM))
        adamw.step()
        parallel.gather()
    with parallel.whole():
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return torch.stack(losses), torch.stack(norms), weights, parallel.cut


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
    ({"tp": 2, "dp": 2}, "1f1b", 3, 2, True),
    ({"pp": 2, "dp": 2}, "interleaved_1f1b", 3, 4, False),
    ({"pp": 4}, "1f1b", 3, 8, False),
    ({"pp": 2, "tp": 2}, "gpipe", 3, 2, True),
    ({"dp": 4, "shard": 2}, "gpipe", 3, 2, False),
    ({"pp": 2, "tp": 2, "dp": 2}, "1f1b", 3, 4, True),
    ({"pp": 2, "tp": 2, "dp": 2}, "1f1b", 2, 4, True),
    ({"pp": 2, "tp": 2, "dp": 2}, "interleaved_1f1b", 1, 2, True),
    ({"pp": 2, "dp": 2}, "zb_v", 2, 4, False),
    ({"pp": 2, "tp": 2, "dp": 2}, "zb_h1", 1, 4, True),
    ({"pp": 2, "dp": 2}, "zb_v", 3, 4, False),
    ({"pp": 2, "tp": 2, "dp": 2}, "zb_h2", 3, 4, True),
    ({"pp": 4, "tp": 2}, "zb_h2", 0, 4, True),
]


@pytest.mark.parametrize("sizes, schedule, zero, micros, sequence_parallel", CASES, ids=str)
def test_equals_one_process(sizes, schedule, zero, micros, sequence_parallel):
    losses, norms, weights = alone()
    found = run(Mesh(**sizes).size, in_parts, sizes, schedule, zero, micros, sequence_parallel)
    torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(0), losses, **TOLERANCE)
    for _, their_norms, theirs, cut in found:
        torch.testing.assert_close(their_norms, norms, **TOLERANCE)
        for name, weight in theirs.items():
            expected = cut[name].of(weights[name]) if name in cut else weights[name]
            torch.testing.assert_close(weight, expected, **TOLERANCE, msg=lambda text, name=name: f"{name} {text}")
    assert set().union(*(theirs for _, _, theirs, _ in found)) == weights.keys()
