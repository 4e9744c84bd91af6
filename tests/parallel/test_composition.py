"""Any layout ends in the weights of one process: tensor and sequence parallel, data parallel, ZeRO, accumulation."""

import itertools

import pytest
import torch

from llmsys import parallel
from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, tensor
from llmsys.parallel.zero import Zero
from tests.parallel.ranks import run

TIED = LlamaConfig(
    vocab_size=32, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=24, tied_head=True
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


def in_parts(sizes, stage, micros, sequence_parallel):
    mesh = parallel.connect(**sizes)
    model = Llama(TIED, dtype=torch.float64)
    shards = tensor.apply(model, PLAN["tensor"], mesh.tp, sequence_parallel=sequence_parallel)
    zero = Zero(model, mesh, stage=stage, bucket_bytes=2000)
    adamw, losses = torch.optim.AdamW(zero.shards(), lr=1e-2), []
    for batch in batches():
        tokens, targets = batch.chunk(mesh.data.size, 1)[mesh.data.rank]
        found = []
        for index, micro in enumerate(zip(tokens.chunk(micros), targets.chunk(micros), strict=True)):
            found.append(model.loss(*micro) / micros)
            if index + 1 < micros:
                with zero.accumulating():
                    found[-1].backward()
            else:
                found[-1].backward()
        zero.reduce()
        adamw.step()
        zero.gather()
        losses.append(sum(found).item())
    return losses, model.state_dict(), shards


LAYOUTS = [({"tp": 2, "dp": 2}, 1), ({"tp": 2, "dp": 2}, 2), ({"tp": 2, "dp": 4, "shard": 2}, 2)]
CASES = [
    *((sizes, stage, micros, sp) for (sizes, micros), stage, sp in itertools.product(LAYOUTS[1:2], (0, 1, 2), (True,))),
    (LAYOUTS[0][0], 2, 1, False),
    (LAYOUTS[2][0], 2, 2, True),
]


@pytest.mark.parametrize("sizes, stage, micros, sequence_parallel", CASES, ids=str)
def test_equals_one_process(sizes, stage, micros, sequence_parallel):
    losses, weights = alone()
    found = run(Mesh(**sizes).size, in_parts, sizes, stage, micros, sequence_parallel)
    mean = torch.tensor([each[0] for each in found], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10)
    for _, theirs, shards in found:
        for name, weight in weights.items():
            expected = shards[name].of(weight) if name in shards else weight
            torch.testing.assert_close(
                theirs[name], expected, rtol=0, atol=1e-10, msg=lambda t, name=name: f"{name} {t}"
            )
