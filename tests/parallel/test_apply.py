"""GPT-2, whose two ends share the embedding; models that have no memory before they are cut."""

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


def in_parts(sizes, zero, micros, sequence_parallel, options):
    mesh = connect(**sizes)
    model = GPT2(SHAPE, dtype=torch.float64)
    parallel = parallelize(
        *(model, PLAN, mesh), zero=zero, sequence_parallel=sequence_parallel, bucket_bytes=2000, **options
    )
    adamw, losses, norms = torch.optim.AdamW(parallel.shards(), lr=1e-2), [], []
    for batch in batches():
        tokens, targets = batch.chunk(mesh.data.size, 1)[mesh.data.rank]
        losses.append(parallel.backward(list(zip(tokens.chunk(micros), targets.chunk(micros), strict=True))))
        norms.append(parallel.clip_grad_norm(MAX_NORM))
        adamw.step()
        parallel.gather()
    with parallel.whole():
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return torch.stack(losses), torch.stack(norms), weights, parallel.cut


@pytest.mark.parametrize(
    "sizes, zero, micros, sequence_parallel, options",
    [
        ({"pp": 2, "tp": 2}, 1, 4, True, {"schedule": "zb_h1", "overlap_chunks": 2}),
        ({"pp": 4}, 0, 4, False, {}),
        ({"tp": 2}, 0, 2, True, {"overlap_chunks": 2, "recompute": "selective"}),
        ({"tp": 2}, 0, 1, False, {"overlap_chunks": 3, "recompute": "full"}),
        ({"pp": 2, "tp": 2, "dp": 2}, 2, 2, True, {}),
        ({"pp": 2, "dp": 2}, 3, 2, False, {"recompute": "full"}),
        ({"dp": 2}, 3, 2, False, {"recompute": "selective"}),
    ],
    ids=str,
)
def test_gpt2_equals_one_process(sizes, zero, micros, sequence_parallel, options):
    losses, norms, weights = alone()
    found = run(Mesh(**sizes).size, in_parts, sizes, zero, micros, sequence_parallel, options)
    torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(0), losses, **TOLERANCE)
    for _, their_norms, theirs, cut in found:
        torch.testing.assert_close(their_norms, norms, **TOLERANCE)
        for name, weight in theirs.items():
            expected = cut[name].of(weights[name]) if name in cut else weights[name]
            torch.testing.assert_close(weight, expected, **TOLERANCE, msg=lambda text, name=name: f"{name} {text}")
    assert set().union(*(theirs for _, _, theirs, _ in found)) == weights.keys()


WIDE = GPT2Config(vocab_size=64, dim=64, num_layers=4, num_heads=4, max_sequence_length=8)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made meanwhile and still there, and their maximum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.untyped_storage() not in self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, num_bytes):
        self.now -= num_bytes


def on_meta(shape=WIDE, dtype=torch.float32):
    with torch.device("meta"):
        return GPT2(shape, dtype=dtype)


def num_bytes(model):
    return [parameter.nbytes for parameter in model.parameters()]


LAYOUTS = [{"tp": 4}, {"tp": 2, "pp": 2}, {"pp": 4}, {"dp": 2}]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_memory_starts_as_the_whole_one(sizes, dtype):
    """Bit for bit, on every rank; beside what it keeps, no rank has more than one whole weight."""
    whole = GPT2(WIDE, seed=4, dtype=dtype)
    largest = max(parameter.numel() * 4 for parameter in whole.parameters())  # drawn in float32
    names = set()
    for rank in range(Mesh(**sizes).size):
        with Live() as live:
            model = on_meta(dtype=dtype)
            parallel = parallelize(model, PLAN, Mesh(**sizes, rank=rank), zero=2, seed=4, bucket_bytes=1)
        # A copy of a part is made where it is cut out, and where it becomes a bucket.
        assert live.peak <= sum(num_bytes(model)) + largest * (1 + 1 / parallel.mesh.tp.size)
        for name, parameter in model.named_parameters():
            expected = whole.get_parameter(name).detach()
            assert torch.equal(parameter, parallel.cut[name].of(expected) if name in parallel.cut else expected), name
            names.add(name)
    assert names == {name for name, _ in whole.named_parameters()}


def test_live_bytes_are_seen():
    """The whole model on each rank would not pass above."""
    with Live() as live:
        model = GPT2(WIDE)
        bytes_of_whole = sum(num_bytes(model))
        assert bytes_of_whole <= live.now < bytes_of_whole + 100
        del model
    assert live.now == 0 and live.peak > bytes_of_whole


def test_parts_of_a_file(tmp_path):
    """Each rank reads its slices, and of its stage alone."""
    whole = GPT2(WIDE, seed=4)
    save_weights(whole, tmp_path / "weights")
    for rank in range(4):
        model = on_meta()
        parallel = parallelize(
            *(model, PLAN, Mesh(tp=2, pp=2, rank=rank)),
            fill=lambda model, cut: load_weights(model, tmp_path / "weights", cut),
        )
        for name, parameter in model.named_parameters():
            expected = whole.get_parameter(name).detach()
            assert torch.equal(parameter, parallel.cut[name].of(expected) if name in parallel.cut else expected), name
    other = dataclasses.replace(WIDE, dim=32)
    with pytest.raises(ValueError, match=r"embedding.weight of shape \(64, 64\), expected \(64, 32\)"):
        parallelize(
            *(on_meta(other), PLAN, Mesh(tp=2)), fill=lambda model, cut: load_weights(model, tmp_path / "weights", cut)
        )


def trained(sizes):
    """Loss and norm of a first step."""
    mesh = connect(**sizes)
    model = on_meta(SHAPE, torch.float64)
    parallel = parallelize(model, PLAN, mesh, seed=0, sequence_parallel=True)
    tokens, targets = batches()[0]
    loss = parallel.backward([(tokens, targets)])
    return loss, parallel.clip_grad_norm(MAX_NORM)


def test_a_model_without_memory_trains():
    """Gradients that ranks must add are added."""
    losses, norms, _ = alone()
    for loss, norm in run(2, trained, {"tp": 2}):
        torch.testing.assert_close(loss, losses[0], **TOLERANCE)
        torch.testing.assert_close(norm, norms[0], **TOLERANCE)


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
    with pytest.raises(ValueError, match=r"tensor: embedding.weight is on the meta device, expected one with memory"):
        tensor.apply(on_meta(), PLAN["tensor"], mesh.tp)
