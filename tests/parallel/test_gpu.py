"""Over NCCL: the collectives, and layouts that end in the weights of one process on a GPU. Ranks have a GPU each, or
share those that there are, each as if on a host of its own.
"""

import pytest
import torch

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, collectives, connect, parallelize
from tests.parallel.ranks import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU, and this machine has none"),
]
TIED = LlamaConfig(
    vocab_size=32, dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=24, tied_head=True
)
STEPS, ROWS, LENGTH, MAX_NORM = 3, 8, 8, 0.05
TOLERANCE = {"rtol": 0, "atol": 1e-10}


# ---- collectives ----


def values(sizes, name):
    mesh = connect(**sizes, device="cuda")
    axis = getattr(mesh, name)
    generator = torch.Generator().manual_seed(0)
    everyone = [torch.randn(4, 6, 12, dtype=torch.float64, generator=generator).cuda() for _ in range(mesh.size)]
    line = [everyone[rank] for rank in axis.ranks]
    mine, total, n = line[axis.rank], sum(line), axis.size
    torch.testing.assert_close(collectives.all_reduce(mine.clone(), axis), total, rtol=0, atol=1e-14)
    assert torch.equal(collectives.all_reduce(mine.clone(), axis, "max"), torch.stack(line).amax(0))
    assert torch.equal(collectives.broadcast(mine.clone(), axis, n - 1), line[-1])
    for dim in range(3):
        assert torch.equal(collectives.all_gather(mine.mT, axis, dim), torch.cat([x.mT for x in line], dim))
        part = collectives.reduce_scatter(mine, axis, dim)
        torch.testing.assert_close(part, total.chunk(n, dim)[axis.rank], rtol=0, atol=1e-14)
        swapped = collectives.all_to_all(mine, axis, dim, 1)
        assert torch.equal(swapped, torch.cat([x.chunk(n, dim)[axis.rank] for x in line], 1))


@pytest.mark.parametrize("sizes, name", [({}, "tp"), ({"tp": 2}, "tp"), ({"dp": 2, "tp": 2}, "dp")], ids=str)
def test_collectives(sizes, name):
    run(Mesh(**sizes).size, values, sizes, name, backend="nccl")


# ---- layouts ----


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(32, (2, ROWS, LENGTH), generator=generator).cuda() for _ in range(STEPS)]


def alone():
    model = Llama(TIED, dtype=torch.float64, device="cuda")
    adamw, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2), [], []
    for tokens, targets in batches():
        losses.append(model.loss(tokens, targets))
        losses[-1].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        adamw.step()
        adamw.zero_grad()
    return torch.stack(losses).detach(), torch.stack(norms), model.state_dict()


def in_parts(sizes, schedule, zero, micros, sequence_parallel):
    mesh = connect(**sizes, device="cuda")
    model = Llama(TIED, dtype=torch.float64, device="cuda")
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
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    return torch.stack(losses).cpu(), torch.stack(norms).cpu(), weights, parallel.cut


# Sizes, schedule, ZeRO stage, microbatches, sequence parallel: each axis alone, then together.
CASES = [
    *(({}, "1f1b", zero, 2, False) for zero in (0, 1, 2)),
    *(({"dp": 2}, "1f1b", zero, 2, False) for zero in (0, 1, 2)),
    *(({"tp": 2}, "1f1b", 0, 2, sequence_parallel) for sequence_parallel in (False, True)),
    *(({"pp": 2}, schedule, 0, 4, False) for schedule in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v")),
    ({"pp": 4}, "1f1b", 1, 8, False),
    ({"pp": 2, "dp": 2}, "1f1b", 2, 4, False),
    ({"pp": 2, "tp": 2}, "interleaved_1f1b", 1, 4, True),
    ({"dp": 2, "tp": 2}, "gpipe", 2, 2, True),
]


@pytest.mark.parametrize("sizes, schedule, zero, micros, sequence_parallel", CASES, ids=str)
def test_equals_one_process(sizes, schedule, zero, micros, sequence_parallel):
    losses, norms, weights = alone()
    found = run(Mesh(**sizes).size, in_parts, sizes, schedule, zero, micros, sequence_parallel, backend="nccl")
    torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(0), losses.cpu(), **TOLERANCE)
    for _, their_norms, theirs, cut in found:
        torch.testing.assert_close(their_norms, norms.cpu(), **TOLERANCE)
        for name, weight in theirs.items():
            expected = cut[name].of(weights[name]) if name in cut else weights[name]
            torch.testing.assert_close(
                weight, expected.cpu(), **TOLERANCE, msg=lambda text, name=name: f"{name} {text}"
            )
    assert set().union(*(theirs for _, _, theirs, _ in found)) == weights.keys()


def large_messages():
    """Loss of a step whose activations are more than NCCL buffers, so that each send waits for its receiver."""
    mesh = connect(pp=2, device="cuda")
    shape = LlamaConfig(vocab_size=32, dim=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, hidden_dim=64)
    parallel = parallelize(Llama(shape, device="cuda"), PLAN, mesh)
    tokens = torch.zeros(4, 8, 1024, dtype=torch.int64, device="cuda")
    return parallel.backward([(micro, micro) for micro in tokens]).item()


def test_activations_and_gradients_pass_each_other():
    first, second = run(2, large_messages, backend="nccl")
    assert first == second
