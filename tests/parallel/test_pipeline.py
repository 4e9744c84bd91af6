"""A Llama in stages has the loss and the gradients of the whole one."""

import itertools

import pytest
import torch

from llmsys import parallel
from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, collectives
from llmsys.parallel.pipeline import Pipeline
from tests.parallel.ranks import run

TIED = LlamaConfig(
    vocab_size=32, dim=12, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=6, hidden_dim=20, tied_head=True
)
SEPARATE = LlamaConfig(**{**vars(TIED), "tied_head": False})
LENGTHS = (5, 8, 5, 3, 8)  # of the microbatches


def microbatches(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(32, (2, 2, LENGTHS[i % 5]), generator=generator).unbind() for i in range(count)]


def alone(shape, count):
    model = Llama(shape, dtype=torch.float64)
    losses = [model.loss(*micro) for micro in microbatches(count)]
    mean = torch.stack(losses).mean()
    mean.backward()
    return mean.item(), {name: p.grad for name, p in model.named_parameters()}


def staged(shape, sizes, schedule, chunks_per_stage, count):
    mesh = parallel.connect(**sizes)
    model = Llama(shape, dtype=torch.float64)
    pipeline = Pipeline(model, PLAN["stages"], mesh.pp, schedule=schedule, chunks_per_stage=chunks_per_stage)
    with parallel.counted() as sent:
        loss = pipeline.step(microbatches(count))
    for name, stage in sorted(pipeline.shared.items()):
        collectives.sum_with(model.get_parameter(name).grad, mesh.pp, stage)
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, dict(sent)


CASES = [
    *itertools.product([TIED], [{"pp": 2}, {"pp": 4}], ["gpipe", "1f1b"], [None], [1, 6]),
    *itertools.product([SEPARATE], [{"pp": 2}], ["interleaved_1f1b", "breadth_first"], [2], [5]),
    (SEPARATE, {"pp": 2, "dp": 2}, "1f1b", None, 3),
    (TIED, {"dp": 2}, "interleaved_1f1b", 3, 2),
    *itertools.product([TIED], [{"pp": 2}, {"pp": 4}], ["zb_h1", "zb_h2"], [None], [1, 6]),
    *itertools.product([TIED], [{"pp": 2}], ["zb_v"], [None], [1, 6]),
]


@pytest.mark.parametrize("shape, sizes, schedule, chunks, count", CASES, ids=lambda value: str(value)[-20:])
def test_equals_the_whole(shape, sizes, schedule, chunks, count):
    loss, gradients = alone(shape, count)
    found = run(Mesh(**sizes).size, staged, shape, sizes, schedule, chunks, count)
    held = set()
    for their_loss, theirs, _ in found:
        assert abs(their_loss - loss) < 1e-12
        for name, gradient in theirs.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-12)
        held |= theirs.keys()
    assert held == gradients.keys()
    if sizes.get("pp", 1) > 1:
        assert all(len(theirs) < len(gradients) for _, theirs, _ in found)


@pytest.mark.parametrize("schedule, chunks, passages", [("1f1b", None, 1), ("interleaved_1f1b", 2, 3)])
def test_traffic(schedule, chunks, passages):
    """Activations and gradients at each passage between stages, what tells their shapes, and the loss."""
    count, (first, last) = 4, run(2, staged, SEPARATE, {"pp": 2}, schedule, chunks, 4)
    activations = sum(2 * LENGTHS[i] * 12 * 8 for i in range(count))
    lengths = len(set(LENGTHS[:count]))
    headers, loss = lengths * 9 * 8, 8
    assert first[2]["pp"] == passages * activations + headers
    assert last[2]["pp"] == passages * activations + (headers if passages > 1 else 0) + loss


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "zb_h3"}, "schedule 'zb_h3', expected one of gpipe, breadth_first, 1f1b, interleaved_1f1b"),
        ({"schedule": "interleaved_1f1b"}, "chunks_per_stage=None for interleaved_1f1b, expected at least 1"),
        ({"schedule": "interleaved_1f1b", "chunks_per_stage": 3}, "5 blocks for 6 stages, expected 1 to 5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(Llama(TIED), "blocks", Mesh(pp=2).pp, **options)
