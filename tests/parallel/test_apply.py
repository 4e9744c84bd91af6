"""`parallelize` on GPT-2, whose two ends share the embedding."""

import pytest
import torch

from llmsys.models.gpt2 import GPT2, PLAN, GPT2Config
from llmsys.parallel import Mesh, connect, parallelize
from tests.parallel.ranks import run

SHAPE = GPT2Config(vocab_size=32, dim=16, num_layers=4, num_heads=4, max_sequence_length=8)
STEPS, ROWS, LENGTH, MAX_NORM = 3, 8, 8, 0.05
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(32, (2, ROWS, LENGTH), generator=generator) for _ in range(STEPS)]


def alone():
    model = GPT2(SHAPE, dtype=torch.float64)
    adamw, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2), [], []
    for tokens, targets in batches():
        losses.append(model.loss(tokens, targets))
        losses[-1].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        adamw.step()
        adamw.zero_grad()
    return torch.stack(losses).detach(), torch.stack(norms), model.state_dict()


def in_parts(sizes, zero, micros, sequence_parallel):
    mesh = connect(**sizes)
    model = GPT2(SHAPE, dtype=torch.float64)
    parallel = parallelize(model, PLAN, mesh, zero=zero, sequence_parallel=sequence_parallel, bucket_bytes=2000)
    adamw, losses, norms = torch.optim.AdamW(parallel.shards(), lr=1e-2), [], []
    for batch in batches():
        tokens, targets = batch.chunk(mesh.data.size, 1)[mesh.data.rank]
        losses.append(parallel.backward(list(zip(tokens.chunk(micros), targets.chunk(micros), strict=True))))
        norms.append(parallel.clip_grad_norm(MAX_NORM))
        adamw.step()
        parallel.gather()
    return torch.stack(losses), torch.stack(norms), model.state_dict(), parallel.cut


@pytest.mark.parametrize(
    "sizes, zero, micros, sequence_parallel",
    [({"pp": 2, "tp": 2}, 1, 4, True), ({"pp": 4}, 0, 4, False), ({"pp": 2, "tp": 2, "dp": 2}, 2, 2, True)],
    ids=str,
)
def test_gpt2_equals_one_process(sizes, zero, micros, sequence_parallel):
    losses, norms, weights = alone()
    found = run(Mesh(**sizes).size, in_parts, sizes, zero, micros, sequence_parallel)
    torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(0), losses, **TOLERANCE)
    for _, their_norms, theirs, cut in found:
        torch.testing.assert_close(their_norms, norms, **TOLERANCE)
        for name, weight in theirs.items():
            expected = cut[name].of(weights[name]) if name in cut else weights[name]
            torch.testing.assert_close(weight, expected, **TOLERANCE, msg=lambda text, name=name: f"{name} {text}")
    assert set().union(*(theirs for _, _, theirs, _ in found)) == weights.keys()
