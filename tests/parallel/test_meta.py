"""Models that have no memory before they are cut."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmsys.models import load_weights, save_weights
from llmsys.models.gpt2 import GPT2, PLAN, GPT2Config
from llmsys.parallel import Mesh, connect, parallelize, tensor
from tests.parallel.ranks import run

SHAPE = GPT2Config(vocab_size=32, dim=16, num_layers=4, num_heads=4, max_sequence_length=8)
WIDE = GPT2Config(vocab_size=64, dim=64, num_layers=4, num_heads=4, max_sequence_length=8)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made meanwhile and still there, and their maximum after any operation."""

    def __init__(self):
        super().__init__()
        self.peak, self.known = 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.known.update(
            leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and not leaf.is_meta
        )
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        return sum(storage.nbytes() for storage in self.known)


def on_meta(shape=WIDE, dtype=torch.float32):
    with torch.device("meta"):
        return GPT2(shape, dtype=dtype)


def num_bytes(model):
    return [parameter.nbytes for parameter in model.parameters()]


def check_start(model, parallel, whole):
    """The bits of its part of the whole model."""
    with parallel.whole():
        for name, parameter in model.named_parameters():
            expected = whole.get_parameter(name).detach()
            assert torch.equal(parameter, parallel.cut[name].of(expected) if name in parallel.cut else expected), name
    return {name for name, _ in model.named_parameters()}


LAYOUTS = [({"tp": 4}, 1), ({"tp": 2, "pp": 2}, 2), ({"pp": 4}, 2), ({"dp": 2}, 1)]


@pytest.mark.parametrize("sizes, zero", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_memory_starts_as_the_whole_one(sizes, zero, dtype):
    """Bit for bit, on every rank; beside what it keeps, no rank has more than one whole weight."""
    whole = GPT2(WIDE, seed=4, dtype=dtype)
    largest = max(parameter.numel() * 4 for parameter in whole.parameters())  # drawn in float32
    names = set()
    for rank in range(Mesh(**sizes).size):
        with Live() as live:
            model = on_meta(dtype=dtype)
            parallel = parallelize(model, PLAN, Mesh(**sizes, rank=rank), zero=zero, seed=4, bucket_bytes=1)
        # Slices of a fused weight are joined before they are written.
        kept = sum(num_bytes(model)) * (2 if zero < 2 else 1)
        assert live.peak <= kept + largest * (1 + 1 / parallel.mesh.tp.size)
        names |= check_start(model, parallel, whole)
    assert names == {name for name, _ in whole.named_parameters()}


def in_zero3():
    with Live() as live:
        model = on_meta()
        parallel = parallelize(model, PLAN, connect(dp=4), zero=3, seed=4, bucket_bytes=1)
    check_start(model, parallel, GPT2(WIDE, seed=4))
    return live.peak


def test_no_rank_of_zero3_ever_has_the_whole_model():
    """But a quarter, and a unit of those that it is gathered in, and one whole weight of it."""
    whole = GPT2(WIDE)
    unit, largest = sum(num_bytes(whole.blocks[0])), max(num_bytes(whole))
    for peak in run(4, in_zero3):
        assert peak <= sum(num_bytes(whole)) / 4 * 1.02 + unit + largest


def test_live_bytes_are_seen():
    """The whole model on each rank would not pass above."""
    with Live() as live:
        model = GPT2(WIDE)
        bytes_of_whole = sum(num_bytes(model))
        assert live.now() == bytes_of_whole
        del model
    assert live.now() == 0 and live.peak > bytes_of_whole


def test_parts_of_a_file(tmp_path):
    """Each rank reads its slices, and of its stage alone."""
    whole = GPT2(WIDE, seed=4)
    save_weights(whole, tmp_path / "weights")
    for rank in range(4):
        model = on_meta()
        parallel = parallelize(
            *(model, PLAN, Mesh(tp=2, pp=2, rank=rank)),
            fill=lambda weights, cut: load_weights(weights, tmp_path / "weights", cut),
        )
        check_start(model, parallel, whole)
    other = dataclasses.replace(WIDE, dim=32)
    with pytest.raises(ValueError, match=r"norm.bias of shape \(64,\), expected \(32,\)"):
        parallelize(
            *(on_meta(other), PLAN, Mesh(tp=2)),
            fill=lambda weights, cut: load_weights(weights, tmp_path / "weights", cut),
        )


def test_frozen_weights_start_too():
    whole = GPT2(WIDE, seed=4)
    for zero in (0, 2):
        model = on_meta()
        model.embedding.requires_grad_(False)
        check_start(model, parallelize(model, PLAN, Mesh(tp=2), zero=zero, seed=4), whole)


def test_errors_of_models_without_memory():
    mesh = Mesh(tp=2)
    with pytest.raises(ValueError, match=r"on the meta device with seed=None and fill=None, expected one of them"):
        parallelize(on_meta(), PLAN, mesh)
    with pytest.raises(ValueError, match=r"seed=3 for a model that has memory, expected one on the meta device"):
        parallelize(GPT2(SHAPE), PLAN, mesh, seed=3)
    half = on_meta()
    half.norm.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"embedding.weight is on the meta device and others are not, expected all"):
        parallelize(half, PLAN, mesh, seed=3)
    half = on_meta()
    half.register_buffer("table", torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match=r"table is a buffer on the meta device, expected parameters alone there"):
        parallelize(half, PLAN, mesh, seed=3)
    with pytest.raises(ValueError, match=r"tensor: embedding.weight is on the meta device, expected one with memory"):
        tensor.apply(on_meta(), PLAN["tensor"], mesh.tp)
