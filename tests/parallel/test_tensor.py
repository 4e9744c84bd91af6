"""Tensor and sequence parallelism: a model in parts has the loss, logits and gradients of the whole one."""

import itertools
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmsys import attention, parallel, rope_qk, swiglu
from llmsys.models import gpt2, llama
from llmsys.models.gpt2 import GPT2, GPT2Config
from llmsys.models.llama import Llama, LlamaConfig
from llmsys.nn import FusedLinear
from llmsys.parallel import Mesh, collectives, tensor
from tests.parallel.ranks import run

TOLERANCE = {"rtol": 0, "atol": 1e-12}


def config(**changes):
    sizes = {"vocab_size": 48, "dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return LlamaConfig(**{**sizes, "hidden_dim": 40, **changes})


class FusedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.wqkv = FusedLinear(config.dim, [each * config.head_dim for each in heads])
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.dim)

    def forward(self, x, cos, sin):
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x))
        return self.wo(attention(*rope_qk(q, k, cos, sin), v, causal=True).flatten(-2))


class FusedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = FusedLinear(config.dim, (config.hidden_dim, config.hidden_dim))
        self.down = nn.Linear(config.hidden_dim, config.dim)

    def forward(self, x):
        return self.down(swiglu(*self.gate_up(x)))


class FusedLlama(Llama):
    def build(self, config):
        super().build(config)
        for block in self.blocks:
            block.attention, block.mlp = FusedAttention(config), FusedMLP(config)


FUSED = {"embedding": "vocab", "head": "vocab", "*.wqkv": "heads", "*.wo": "row", "*.gate_up": "column"}
FUSED["*.down"] = "row"
MODELS = {
    "llama": (Llama, llama.PLAN["tensor"]),
    "fused": (FusedLlama, FUSED),
    "gpt2": (GPT2, gpt2.PLAN["tensor"]),
}
SMALL_GPT2 = GPT2Config(vocab_size=48, dim=24, num_layers=2, num_heads=4, max_sequence_length=10)


def made(kind, shape):
    """In float64, and no bias zero, so that each counts."""
    model = MODELS[kind][0](shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 10
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(48, (2, 3, 8), generator=generator)
    targets[0, :3] = -100
    return tokens, targets


def whole(kind, shape):
    """Loss, logits and gradients in one process."""
    model = made(kind, shape)
    tokens, targets = batch()
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach(), model(tokens).detach(), {name: p.grad for name, p in model.named_parameters()}


def in_parts(kind, shape, size, sequence_parallel, sizes, overlap_chunks=1):
    axis = parallel.connect(tp=size, **sizes).tp
    model = made(kind, shape)
    shards = tensor.apply(
        *(model, MODELS[kind][1], axis), sequence_parallel=sequence_parallel, overlap_chunks=overlap_chunks
    )
    tokens, targets = batch()
    with parallel.counted() as sent_forward:
        loss = model.loss(tokens, targets)
    with parallel.counted() as sent:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), model(tokens).detach(), gradients, shards, dict(sent), dict(sent_forward)


SHAPES = [
    ("llama", config(num_kv_heads=1, tied_head=True)),
    ("llama", config()),
    ("llama", config(num_kv_heads=4, tied_head=True)),
    ("fused", config(num_kv_heads=1)),
    ("fused", config(tied_head=True)),
    ("gpt2", SMALL_GPT2),
]
CASES = [(*shape, *rest) for shape, *rest in itertools.product(SHAPES, (2, 4), (False, True))]


@pytest.mark.parametrize("kind, shape, size, sequence_parallel", CASES, ids=lambda value: str(value)[-40:])
def test_equals_the_whole(kind, shape, size, sequence_parallel):
    check(whole(kind, shape), run(size, in_parts, kind, shape, size, sequence_parallel, {}))


def check(expected, found):
    """Every rank has the loss, the logits and its part of the gradients; together they have all of them."""
    loss, logits, gradients = expected
    held = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for their_loss, their_logits, theirs, shards, *_ in found:
        torch.testing.assert_close(their_loss, loss, **TOLERANCE)
        torch.testing.assert_close(their_logits, logits, **TOLERANCE)
        assert theirs.keys() == gradients.keys()
        for name, gradient in theirs.items():
            part = shards[name].of(gradients[name]) if name in shards else gradients[name]
            torch.testing.assert_close(gradient, part, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
            for mask in shards[name].slices_of(held[name]) if name in shards else [held[name]]:
                mask.fill_(1)
    assert all((mask == 1).all() for mask in held.values()), "some part of a weight is nowhere"
    uncut = ("norm.weight", "norm.bias", "positions.weight", "wo.bias", "down.bias")
    assert {name for name in gradients if not name.endswith(uncut)} == set(found[0][3])


# Of 8 tokens: as many on every rank in each chunk, and not.
OVERLAPS = [(*SHAPES[i], *rest) for i in (1, 3, 5) for rest in ((2, 2, True), (2, 3, False), (4, 3, True))]


@pytest.mark.parametrize("kind, shape, size, chunks, sequence_parallel", OVERLAPS, ids=lambda value: str(value)[-40:])
def test_chunks_equal_the_whole(kind, shape, size, chunks, sequence_parallel):
    check(whole(kind, shape), run(size, in_parts, kind, shape, size, sequence_parallel, {}, chunks))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_chunks_send_the_same_bytes(sequence_parallel):
    """Forward and backward."""
    sent = [run(2, in_parts, "gpt2", SMALL_GPT2, 2, sequence_parallel, {}, chunks)[0][4:] for chunks in (1, 3)]
    assert sent[0] == sent[1]


class Log(TorchDispatchMode):
    """What is multiplied, and what is sent, in order."""

    events = ""

    def started(self, start, letter):
        def logged(*args, **kwargs):
            self.events += letter
            pending = start(*args, **kwargs)
            result = pending.result
            pending.result = lambda: self.waited(letter, result)
            return pending

        return logged

    def waited(self, letter, result):
        self.events += letter.upper()
        return result()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.events += "*"
        return func(*args, **kwargs or {})


def logged():
    axis = parallel.connect(tp=2).tp
    model, log = nn.Sequential(Biased()).double(), Log()
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    gather = log.started(collectives.start_all_gather, "g")
    scatter = log.started(collectives.start_reduce_scatter, "s")
    with mock.patch.multiple(collectives, start_all_gather=gather, start_reduce_scatter=scatter), log:
        tensor.apply(model, {"*.up": "column", "*.down": "row"}, axis, sequence_parallel=True, overlap_chunks=2)
        y = model(x)
        forward, log.events = log.events, ""
        y.backward(torch.ones_like(y))
    return forward, log.events


def test_chunks_are_on_their_way_while_others_are_multiplied():
    """g and s start a gather and a reduce-scatter, G and S wait for one, * is a product."""
    for forward, backward in run(2, logged):
        assert forward == "ggG*G**s*sSS"
        # Each chunk that returns is multiplied for its input and its weight. All that enters is waited for at the end.
        assert backward == "ggG**G****s**sSS"


def test_beside_other_axes():
    """The ranks of one line of tp compute alike, whatever line it is."""
    shape = config()
    loss, _, gradients = whole("llama", shape)
    for their_loss, _, theirs, shards, *_ in run(4, in_parts, "llama", shape, 2, True, {"dp": 2}):
        torch.testing.assert_close(their_loss, loss, **TOLERANCE)
        for name, shard in shards.items():
            torch.testing.assert_close(theirs[name], shard.of(gradients[name]), **TOLERANCE)


def test_traffic_of_sequences_is_that_of_tensors():
    """But for the gradients of norms, which see a part of the tokens each."""
    shape, activations = config(), 3 * 8 * 24 * 8
    norms = (2 * shape.num_layers + 1) * 24 * 8
    tensors, sequences = (run(2, in_parts, "llama", shape, 2, way, {})[0][4]["tp"] for way in (False, True))
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
        (
            {"*.wq": "heads", "*.wo": "row"},
            8,
            r"blocks.0.attention.wo.weight of shape \(24, 32\) has 4 heads, expected a multiple of the 8 ranks",
        ),
    ],
)
def test_errors(plan, size, message):
    with pytest.raises(ValueError, match=message):
        tensor.apply(Llama(config()), plan, Mesh(tp=size).tp)


@pytest.mark.parametrize(
    "changes, size, message",
    [
        (
            {"num_heads": 6, "num_kv_heads": 3},
            2,
            r"blocks.0.attention.wqkv.weight part 1 of sizes \(48, 24, 24\) has 3 heads, expected a multiple of the 2",
        ),
        ({"hidden_dim": 42}, 4, r"blocks.0.mlp.gate_up.weight part 0 of sizes \(42, 42\) has 42 outputs, expected a"),
    ],
)
def test_errors_of_fused_layers(changes, size, message):
    with pytest.raises(ValueError, match=message):
        tensor.apply(FusedLlama(config(**changes)), FUSED, Mesh(tp=size).tp)


class Careless(Biased):
    def forward(self, x):
        return super().forward(x.square())


def careless():
    axis = parallel.connect(tp=2).tp
    model = nn.Sequential(Careless())
    tensor.apply(model, {"*.up": "column", "*.down": "row"}, axis, overlap_chunks=2)
    with pytest.raises(AttributeError, match=r"a region reads 'square' of what enters it, expected it given to col"):
        model(torch.randn(1, 4, 6))
    with pytest.raises(TypeError, match=r"0.up was given a Tensor, expected what enters its region as it is"):
        model[0].up(torch.randn(1, 4, 6))


def test_errors_of_chunks():
    run(2, careless)
    with pytest.raises(ValueError, match=r"overlap_chunks=0, expected 1 or more"):
        tensor.apply(Llama(config()), llama.PLAN["tensor"], Mesh(tp=2).tp, overlap_chunks=0)
