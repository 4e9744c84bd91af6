"""bfloat16 weights over ranks: the bits that one process has, which rounds at the same places."""

import itertools

import pytest
import torch

from llmsys import parallel
from llmsys.models.llama import Llama, LlamaConfig
from llmsys.parallel.zero import Zero
from tests.parallel.ranks import run

SHAPE = LlamaConfig(
    vocab_size=32, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, tied_head=True
)
BFLOAT16 = torch.bfloat16
RANKS, MICROS, STEPS = 2, 2, 3
RATE = 2.0**-4  # a power of two: an update is rounded once, whether or not a product and a sum are fused


def batches():
    """Of each step, each rank's microbatches."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        rows = torch.randint(32, (2, 2 * RANKS * MICROS, 5), generator=generator)
        yield [list(zip(*(x.chunk(MICROS) for x in mine), strict=True)) for mine in rows.chunk(RANKS, 1)]


def alone(stage, reduce_dtype, master_dtype):
    """The same by hand: gradients are rounded to `reduce_dtype` at each sum, weights to bfloat16 after each step."""
    model = Llama(SHAPE, dtype=BFLOAT16)
    weights = list(model.parameters())
    masters = [weight.detach().to(master_dtype or BFLOAT16, copy=True) for weight in weights]
    for step in batches():
        found = [[gradients(model, micro) for micro in mine] for mine in step]
        for i, (weight, master) in enumerate(zip(weights, masters, strict=True)):
            grads = torch.stack([torch.stack([micro[i] for micro in mine]) for mine in found])
            grads = grads.to(reduce_dtype or BFLOAT16)
            # Stages 0 and 1 add microbatches first, 2 and 3 ranks. A sum of two is rounded once, in either order.
            (a, b), (c, d) = grads if stage < 2 else grads.transpose(0, 1)
            mean = ((a + b) + (c + d)) / RANKS
            master.add_(mean.to(master.dtype), alpha=-RATE)
            weight.data.copy_(master)
    return [weight.detach() for weight in weights]


def gradients(model, micro):
    return torch.autograd.grad(model.loss(*micro) / MICROS, list(model.parameters()))


def shared(stage, reduce_dtype, master_dtype):
    mesh = parallel.connect(dp=RANKS)
    model = Llama(SHAPE, dtype=BFLOAT16)
    options = {"reduce_dtype": reduce_dtype, "master_dtype": master_dtype}
    zero = Zero(model, mesh, stage=stage, units=model.blocks, bucket_bytes=400, **options)
    sgd = torch.optim.SGD(zero.shards(), lr=RATE)
    for step in batches():
        *before, last = step[mesh.data.rank]
        for micro in before:
            with zero.accumulating():
                (model.loss(*micro) / MICROS).backward()
        (model.loss(*last) / MICROS).backward()
        zero.reduce()
        assert all(shard.grad.dtype == (master_dtype or BFLOAT16) for shard in zero.shards())
        sgd.step()
        zero.gather()
    with zero.whole():
        weights = [weight.detach().clone() for weight in model.parameters()]
    return weights, alone(stage, reduce_dtype, master_dtype), alone(stage, None, master_dtype)


@pytest.mark.parametrize(
    "stage, reduce_dtype, master_dtype",
    [
        *itertools.product([0, 1, 2, 3], [torch.float32], [torch.float32]),
        *((stage, None, torch.float32) for stage in (1, 3)),
        *((stage, torch.float32, None) for stage in (0, 2)),
        *((stage, None, None) for stage in (0, 3)),
    ],
    ids=str,
)
def test_same_bits(stage, reduce_dtype, master_dtype):
    for weights, expected, narrow in run(RANKS, shared, stage, reduce_dtype, master_dtype):
        for weight, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, wanted, rtol=0, atol=0)
        if reduce_dtype is not None:  # sums in bfloat16 end elsewhere
            assert any(not torch.equal(weight, other) for weight, other in zip(weights, narrow, strict=True))
