"""Gradients that products add right where they are summed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, parallelize

CONFIG = LlamaConfig(vocab_size=13, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12)
DIRECT = {
    "embedding.weight",
    *(f"blocks.{i}.attention.{name}.weight" for i in (0, 1) for name in ("wq", "wk", "wv", "wo")),
    *(f"blocks.{i}.mlp.{name}.weight" for i in (0, 1) for name in ("gate", "up", "down")),
}


def batch(num_micros):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(13, (num_micros, 2, 6), generator=generator)  # of 13 rows: many are found more than once
    return list(zip(tokens[..., :-1], tokens[..., 1:], strict=True))


def expected(micros):
    model = Llama(CONFIG, dtype=torch.float64)
    torch.stack([model.loss(*micro) for micro in micros]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def found(parallel):
    return {piece.name: gradient.view(piece.shape) for piece, _, gradient in parallel.zero.gradients()}


@pytest.mark.parametrize(
    "num_micros, zero, direct",
    [(3, 0, DIRECT), (3, 1, DIRECT), (1, 0, {"embedding.weight"}), (3, 2, {"embedding.weight"})],
)
def test_sums_without_autograd(num_micros, zero, direct):
    """Autograd has none of the gradients that products add themselves, where more than one is summed."""
    model, micros = Llama(CONFIG, dtype=torch.float64), batch(num_micros)
    parallel = parallelize(model, PLAN, Mesh(), zero=zero)
    seen = {name: [] for name in DIRECT}
    for name in DIRECT:
        node = torch.autograd.graph.get_gradient_edge(model.get_parameter(name)).node
        node.register_hook(lambda _, arrived, name=name: seen[name].append(arrived[0]))
    parallel.backward(micros)
    assert all(len(arrived) == num_micros for arrived in seen.values())
    assert {name for name, arrived in seen.items() if all(gradient is None for gradient in arrived)} == direct
    torch.testing.assert_close(found(parallel), expected(micros), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_watched_weight(schedule):
    """Hooks of a user's see the gradient of each microbatch."""
    model, micros = Llama(CONFIG, dtype=torch.float64), batch(3)
    parallel = parallelize(model, PLAN, Mesh(), schedule=schedule)
    weight, seen = model.blocks["0"].attention.wq.weight, []
    weight.register_hook(lambda gradient: seen.append(gradient))
    parallel.backward(micros)
    arrived = [gradient for gradient in seen if gradient is not None]
    torch.testing.assert_close(sum(arrived), expected(micros)["blocks.0.attention.wq.weight"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found(parallel), expected(micros), rtol=1e-12, atol=1e-15)


def test_gradients_for_others():
    """Outside of a step, autograd's are whole."""
    model, micros = Llama(CONFIG, dtype=torch.float64), batch(2)
    parallel = parallelize(model, PLAN, Mesh())
    parallel.backward(micros)
    parallel.gather()
    alone = Llama(CONFIG, dtype=torch.float64)

    def gradients(model, blocks):
        x = model.run(model.enter(micros[0][0]), blocks, 5)
        weights = [parameter for name, parameter in model.named_parameters() if "w" in name]
        return torch.autograd.grad(model.leave(x, micros[0][1]), weights)

    torch.testing.assert_close(
        gradients(model, model.blocks.values()), gradients(alone, alone.blocks), rtol=1e-12, atol=1e-15
    )


def test_copies():
    """A model's copy, or what a file has of it, is as it was before."""
    model = parallelize(Llama(CONFIG, dtype=torch.float64), PLAN, Mesh()).model
    for copied in (copy.deepcopy(model.norm), pickle.loads(pickle.dumps(model.norm))):
        assert getattr(copied.weight, "llmsys_sink", None) is None
        assert torch.equal(copied.weight, model.norm.weight)


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_other_embeddings(options):
    """Rows that are not simply summed are left to PyTorch."""

    def made():
        model = Llama(CONFIG, dtype=torch.float64)
        weight = model.embedding.weight.detach().clone()
        model.embedding = nn.Embedding(13, 8, _weight=weight, **options)
        return model

    micros, alone = batch(2), made()
    for micro in micros:
        (alone.loss(*micro) / 2).backward()
    parallel = parallelize(made(), PLAN, Mesh())
    parallel.backward(micros)
    torch.testing.assert_close(
        found(parallel), {name: p.grad for name, p in alone.named_parameters()}, rtol=1e-12, atol=1e-15
    )
