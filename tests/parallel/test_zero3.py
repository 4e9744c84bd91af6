"""ZeRO-3: which parameters are whole, when, and what that sends and holds."""

from copy import deepcopy
from functools import partial
from io import BytesIO

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmsys import linear, parallel
from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh
from llmsys.parallel.zero import Zero
from tests.parallel.ranks import run

SHAPE = LlamaConfig(vocab_size=32, dim=12, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=6, hidden_dim=20)
TIED = LlamaConfig(**{**vars(SHAPE), "tied_head": True})


def batch(rows=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(32, (2, rows, 5), generator=generator).unbind()


def gradients(shape, rows):
    model = Llama(shape, dtype=torch.float64)
    model.loss(*(x[rows] for x in batch())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def owned(zero, grads):
    """This rank's parts of whole gradients, as `zero.gradients()` lists its own."""
    parts = {}
    for flat in zero._flats:
        for piece, start, place in flat.owned():
            parts[piece.name] = grads[piece.name].flatten()[start : start + place.stop - place.start]
    return parts


def check_gradients(zero, shape, times=1):
    rows = slice(None)
    expected = owned(zero, gradients(shape, rows))
    for piece, _, gradient in zero.gradients():
        torch.testing.assert_close(gradient, times * expected[piece.name], rtol=0, atol=1e-12, msg=piece.name)


# ---- what it sends ----


def traffic(shape, micros):
    mesh = parallel.connect(dp=3)
    model = Llama(shape, dtype=torch.float64)
    zero = Zero(model, mesh, stage=3, units=model.blocks)
    sizes = [sum(flat.whole.nbytes for flat in unit.flats) for unit in zero._units._units]
    sent = []
    for _ in range(3):
        with parallel.counted() as counter:
            for _ in range(micros):
                model.loss(*batch(3)).backward()
            zero.reduce()
            zero.gather()
        sent.append(dict(counter))
    return sent, sizes, sum(p.numel() * 8 for p in model.parameters())


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["separate", "tied"])
def test_traffic(shape, micros):
    """Ψ for the forward, the backward and the gradients, each; the last unit, whose backward follows, stays between.

    An embedding's backward reads none of it. The third step is as the second, and the first: nothing is gathered that
    nobody uses.
    """
    for sent, (first, *blocks, last), num_bytes in run(3, traffic, shape, micros):
        gathered = 2 * sum(blocks) + (first + last if shape is SHAPE else 2 * first + last)
        whole = micros * (gathered + first + sum(blocks) + last)
        assert sent == [{"shard": whole * 2 // 3}] * 3
        assert 2 * micros * num_bytes < whole < 1.01 * 3 * micros * num_bytes


def pipelined_traffic(schedule, micros):
    mesh = parallel.connect(pp=2, dp=2)
    model = Llama(TIED, dtype=torch.float64)
    it = parallel.parallelize(model, PLAN, mesh, zero=3, schedule=schedule)
    for _ in range(2):
        with parallel.counted() as sent:
            it.backward([batch()] * micros)
            it.gather()
    return sent["shard"], sum(flat.whole.nbytes for flat in it.zero._flats)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_v"])
def test_traffic_of_a_pipeline(schedule):
    """3Ψ for each microbatch at most, of the Ψ that a stage holds, once the order is known."""
    for sent, num_bytes in run(4, pipelined_traffic, schedule, 3):
        assert 2 * 3 * num_bytes // 2 < sent <= 3 * 3 * num_bytes // 2


# ---- what it holds ----


def presence(shape, recompute):
    """Which units have storage at each call of a block, forward and backward."""
    mesh = parallel.connect(dp=2)
    model = Llama(shape, dtype=torch.float64)
    if recompute == "within":
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    zero = Zero(model, mesh, stage=3, units=model.blocks)
    if recompute == "around":
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    seen = []

    def here(*_):
        units = zero._units._units
        sizes = [sum(flat.whole.untyped_storage().nbytes() for flat in unit.flats) for unit in units]
        seen.append("".join(str(i) for i, size in enumerate(sizes) if size))

    for block in model.blocks:
        block.mlp.register_forward_pre_hook(here)
        block.mlp.down.weight.register_hook(here)
    for _ in range(2):
        seen.clear()
        model.loss(*batch()).backward()
        here()
        zero.reduce()
        check_gradients(zero, shape)
        zero.gather()
    return seen


@pytest.mark.parametrize("recompute", ["none", "around", "within"])
def test_presence(recompute):
    """Two units at a time: the one at work and the next one; none between steps."""
    forward = ["12", "23", "34", "45"]
    backward = ["34", "23", "12", "1"]
    if recompute != "none":  # each block's forward runs once more within its backward
        backward = [each for each in backward for _ in range(2)]
    for seen in run(2, presence, SHAPE, recompute):
        assert seen == [*forward, *backward, ""]


def reading(shape):
    mesh = parallel.connect(dp=2)
    model, alone = Llama(shape, dtype=torch.float64), Llama(shape, seed=1, dtype=torch.float64)
    zero = Zero(model, mesh, stage=3, units=model.blocks)
    messages = []
    for function in (model.state_dict, lambda: model.load_state_dict(alone.state_dict())):
        with pytest.raises(RuntimeError) as caught:
            function()
        messages.append(str(caught.value))
    with zero.whole(write=True):
        model.load_state_dict(alone.state_dict())
    with zero.whole():
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, alone.state_dict()[name], rtol=0, atol=0)
        inside = model(batch()[0])
    with torch.inference_mode():
        outside = model(batch()[0])
    torch.testing.assert_close(outside, alone(batch()[0]), rtol=0, atol=1e-14)
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-14)
    model(batch()[0]).sum().backward()  # as a model that is called as a whole
    zero.reduce()
    expected = torch.autograd.grad(alone(batch()[0]).sum(), list(alone.parameters()))
    expected = owned(zero, {name: grad for (name, _), grad in zip(alone.named_parameters(), expected, strict=True)})
    for piece, _, gradient in zero.gradients():
        torch.testing.assert_close(gradient, expected[piece.name], rtol=0, atol=1e-12)
    return messages


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["separate", "tied"])
def test_reading(shape):
    for messages in run(2, reading, shape):
        assert all("a Llama whose parameters are in parts, expected" in message for message in messages)


# What a user may try of a parameter w, or of a module m that has it, where its numbers are elsewhere.
READS = {
    "add": lambda w, m: 1 + w,
    "sum": lambda w, m: torch.sum(w),
    "stack": lambda w, m: torch.stack([w, w]),
    "row": lambda w, m: w[0],
    "list": lambda w, m: w.tolist(),
    "numpy": lambda w, m: w.numpy(),
    "data": lambda w, m: w.data,
    "detach": lambda w, m: w.detach(),
    "address": lambda w, m: w.data_ptr(),
    "transposed": lambda w, m: w.T,
    "copy": lambda w, m: w.clone(),
    "write": lambda w, m: w.copy_(torch.zeros(w.shape)),
    "initialise": lambda w, m: nn.init.normal_(w),
    "deepcopy": lambda w, m: deepcopy(w),
    "save": lambda w, m: torch.save(w, BytesIO()),
    "torch's linear": lambda w, m: F.linear(torch.ones(w.shape[1], dtype=w.dtype), w),
    "linear": lambda w, m: linear(torch.ones(w.shape[1], dtype=w.dtype), w),
    "module": lambda w, m: m(torch.ones(w.shape[1], dtype=w.dtype)),
    "other type": lambda w, m: m.to(torch.bfloat16),
}


def reads_of_what_is_elsewhere():
    model = Llama(SHAPE, dtype=torch.float64)
    module = model.blocks[1].mlp.down
    weight = module.weight
    zero = Zero(model, parallel.connect(dp=2), stage=3, units=model.blocks)
    for when in ("at first", "between a forward and its backward", "at last"):
        for name, read in READS.items():
            with pytest.raises(RuntimeError) as caught:
                read(weight, module)
            assert "a parameter of shape (12, 20), which is in parts on many ranks; expected" in str(caught.value), name
        assert f"{weight}" == "a parameter of shape (12, 20) that is in parts on many ranks"
        assert weight.shape == weight.size() == (12, 20) and weight.numel() == 240 and weight.dtype == torch.float64
        assert isinstance(weight, nn.Parameter) and weight.requires_grad and {weight: 1}[weight] and weight.is_leaf
        if when == "at first":
            loss = model.loss(*batch())
        elif when != "at last":
            loss.backward()
            zero.reduce()
            check_gradients(zero, SHAPE)
            zero.gather()
    with zero.whole():
        assert type(weight) is nn.Parameter and weight.sum().isfinite()


def test_reads_of_what_is_elsewhere():
    run(2, reads_of_what_is_elsewhere)


# ---- backwards in parts, and wrong ones ----


def held(stage):
    """Of two microbatches, first the backwards that find vectors' gradients, then those that find matrices'."""
    mesh = parallel.connect(dp=2)
    model = Llama(TIED, dtype=torch.float64)
    zero = Zero(model, mesh, stage=stage, units=model.blocks, bucket_bytes=400)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    found = []
    for _ in range(2):
        loss = model.loss(*batch())
        with zero.holding(), parallel.counted() as sent, zero.whole():
            sent.clear()
            loss.backward(inputs=vectors, retain_graph=True)
            found.append(torch.autograd.grad(loss, matrices))
            assert not sent
    with zero.accumulating():
        torch.autograd.backward(matrices, found[0])
    torch.autograd.backward(matrices, found[1])
    zero.reduce()
    check_gradients(zero, TIED, times=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_backward_in_parts(stage):
    run(2, held, stage)


def refused(stage):
    parallel.connect(dp=1)
    model = Llama(TIED, dtype=torch.float64)
    zero = Zero(model, Mesh(), stage=stage, units=model.blocks)
    with pytest.raises(RuntimeError, match="no gradients, expected a backward since construction or `gather`"):
        zero.reduce()
    model.loss(*batch()).backward()
    zero.reduce()
    with pytest.raises(RuntimeError, match=f"a backward after the gradients of stage {stage} were reduced, expected"):
        model.loss(*batch()).backward()
    forwards = [block.forward for block in model.blocks]
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    zero.gather()
    with pytest.raises(RuntimeError, match="within one that has not ended, expected torch.utils.checkpoint with use_r"):
        model.loss(*batch()).backward()
    for block, forward in zip(model.blocks, forwards, strict=True):
        block.forward = forward
    zero.gather()
    model.loss(*batch()).backward()
    zero.reduce()
    check_gradients(zero, TIED)


@pytest.mark.parametrize("stage", [1, 3])
def test_refused(stage):
    run(1, refused, stage)
