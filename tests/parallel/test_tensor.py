"""Tensor and sequence parallelism: a Llama in parts has the loss, logits and gradients of the whole one."""

import itertools

import pytest
import torch
from torch import nn

from llmsys import parallel
from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, tensor
from tests.parallel.ranks import run

TOLERANCE = {"rtol": 0, "atol": 1e-12}


def config(**changes):
    sizes = {"vocab_size": 48, "dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return LlamaConfig(**{**sizes, "hidden_dim": 40, **changes})


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(48, (2, 3, 8), generator=generator)
    targets[0, :3] = -100
    return tokens, targets


def whole(shape):
    """Loss, logits and gradients in one process."""
    model = Llama(shape, dtype=torch.float64)
    tokens, targets = batch()
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach(), model(tokens).detach(), {name: p.grad for name, p in model.named_parameters()}


def in_parts(shape, size, sequence_parallel, sizes):
    axis = parallel.connect(tp=size, **sizes).tp
    model = Llama(shape, dtype=torch.float64)
    shards = tensor.apply(model, PLAN["tensor"], axis, sequence_parallel=sequence_parallel)
    tokens, targets = batch()
    loss = model.loss(tokens, targets)
    with parallel.counted() as sent:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), model(tokens).detach(), gradients, shards, dict(sent)


CASES = [
    (config(num_kv_heads=kv, tied_head=tied), size, sequence_parallel)
    for (kv, tied), size, sequence_parallel in itertools.product(
        ((1, True), (2, False), (4, True)), (2, 4), (False, True)
    )
]


@pytest.mark.parametrize("shape, size, sequence_parallel", CASES, ids=lambda value: str(value)[-40:])
def test_equals_the_whole(shape, size, sequence_parallel):
    loss, logits, gradients = whole(shape)
    found = run(size, in_parts, shape, size, sequence_parallel, {})
    held = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for their_loss, their_logits, theirs, shards, _ in found:
        torch.testing.assert_close(their_loss, loss, **TOLERANCE)
        torch.testing.assert_close(their_logits, logits, **TOLERANCE)
        assert theirs.keys() == gradients.keys()
        for name, gradient in theirs.items():
            part = shards[name].of(gradients[name]) if name in shards else gradients[name]
            torch.testing.assert_close(gradient, part, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
            (shards[name].of(held[name]) if name in shards else held[name]).fill_(1)
    assert all((mask == 1).all() for mask in held.values()), "some part of a weight is nowhere"
    assert {name for name in gradients if "norm" not in name} == set(found[0][3])


def test_beside_other_axes():
    """The ranks of one line of tp compute alike, whatever line it is."""
    shape = config()
    loss, _, gradients = whole(shape)
    for their_loss, _, theirs, shards, _ in run(4, in_parts, shape, 2, True, {"dp": 2}):
        torch.testing.assert_close(their_loss, loss, **TOLERANCE)
        for name, shard in shards.items():
            torch.testing.assert_close(theirs[name], shard.of(gradients[name]), **TOLERANCE)


def test_traffic_of_sequences_is_that_of_tensors():
    """But for the gradients of norms, which see a part of the tokens each."""
    shape, activations = config(), 3 * 8 * 24 * 8
    norms = (2 * shape.num_layers + 1) * 24 * 8
    tensors, sequences = (run(2, in_parts, shape, 2, way, {})[0][-1]["tp"] for way in (False, True))
    # Backward: each of 2 regions a layer, and the head. With sequences the same bytes in two halves: what enters, and
    # once more what leaves.
    assert tensors == (2 * shape.num_layers + 1) * activations
    regions = 2 * shape.num_layers * activations
    assert sequences == regions + activations // 2 + activations // 2 + norms


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def biased():
    torch.manual_seed(0)
    model = nn.Sequential(Biased()).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    shards = tensor.apply(model, {"*.up": "column", "*.down": "row"}, parallel.connect(tp=2).tp)
    found = model(x)
    found.sum().backward()
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for name, parameter in model.named_parameters():
        part = shards[name].of(gradients[name]) if name in shards else gradients[name]
        torch.testing.assert_close(parameter.grad, part, **TOLERANCE)
    assert set(shards) == {"0.up.weight", "0.up.bias", "0.down.weight"}


def test_biases():
    run(2, biased)


@pytest.mark.parametrize(
    "plan, size, message",
    [
        ({"*.wq": "columns"}, 2, r"'\*.wq' is 'columns', expected one of column, heads, row, vocab"),
        ({"*.wx": "column"}, 2, r"'\*.wx' matches no module of Llama, expected a pattern of names such as 'blocks.0"),
        ({"*.up": "column"}, 2, r"of blocks.0.mlp blocks.0.mlp.up cut by column alone"),
        (
            {"*.wq": "heads", "*.wo": "row"},
            3,
            r"blocks.0.attention.wq.weight of shape \(32, 24\) has 4 heads, expected",
        ),
        (
            {"embedding": "vocab"},
            5,
            r"embedding.weight of shape \(48, 24\) has 48 tokens, expected a multiple of the 5",
        ),
        ({"*.gate": "column", "*.up": "column", "*.down": "row"}, 3, r"\(40, 24\) has 40 outputs, expected a multiple"),
    ],
)
def test_errors(plan, size, message):
    with pytest.raises(ValueError, match=message):
        tensor.apply(Llama(config()), plan, Mesh(tp=size).tp)
