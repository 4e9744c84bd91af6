"""Over NCCL: the collectives, and layouts that train as one process does on the CPU. Ranks have a GPU each, or
share those that there are, each as if on a host of its own.
"""

import pytest
import torch

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, collectives, connect, parallelize
from tests.parallel.composition import TOLERANCE, errors
from tests.parallel.layouts import layout_of
from tests.parallel.ranks import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU, and this machine has none"),
]


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

# Each axis alone, then together.
CASES = [
    *({"zero": zero} for zero in (0, 1, 2, 3)),
    *({"shard": 2, "zero": zero} for zero in (0, 1, 2, 3)),
    *({"tp": 2, "sequence_parallel": sequence_parallel} for sequence_parallel in (False, True)),
    *({"pp": 2, "micros": 8, "schedule": name} for name in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v")),
    {"pp": 4, "micros": 8, "schedule": "1f1b", "zero": 1},
    {"pp": 2, "shard": 2, "micros": 8, "schedule": "1f1b", "zero": 2},
    {"pp": 2, "tp": 2, "micros": 8, "schedule": "interleaved_1f1b", "zero": 1, "sequence_parallel": True},
    {"shard": 2, "tp": 2, "zero": 2, "sequence_parallel": True},
]


@pytest.mark.parametrize("choices", CASES, ids=str)
def test_equals_one_process(choices):
    found = errors(layout_of(**{"micros": 2, **choices}), "cuda")
    assert all(error <= TOLERANCE for error in found.values()), found


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
