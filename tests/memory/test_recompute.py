"""Recomputation: the same gradients, from less that is kept."""

import pytest
import torch

from llmsys.memory import recompute
from llmsys.models.llama import PLAN, Llama, LlamaConfig

SHAPE = LlamaConfig(vocab_size=32, dim=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=48)


def step(patterns):
    """Gradients, and the bytes that were kept for backward, besides weights."""
    model = Llama(SHAPE, dtype=torch.float64)
    if patterns:
        recompute(model, patterns)
    tokens, targets = torch.randint(32, (2, 2, 24), generator=torch.Generator().manual_seed(0))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(x):
        if (address := x.untyped_storage().data_ptr()) not in weights:
            kept[address] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(tokens, targets)
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}, sum(kept.values())


def test_same_gradients_from_less():
    expected, most = step(None)
    amounts = []
    for patterns in (PLAN["recompute"], ["blocks.?"], ["*.mlp", "blocks.?.attention"]):
        gradients, kept = step(patterns)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name])
        amounts.append(kept)
    selective, full, both = amounts
    rows, heads, kv_heads = 2 * 24, SHAPE.num_heads * 8, SHAPE.num_kv_heads * 8
    lse = SHAPE.num_heads
    assert most - selective == 3 * rows * 8 * (2 * heads + 2 * kv_heads + lse)  # q, k, v and y, and statistics
    assert full < both < selective


def test_names():
    model = Llama(SHAPE)
    assert recompute(model, ["*.mlp", "blocks.1.mlp"]) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert not hasattr(model.blocks[0].attention.forward, "func")


def test_without_gradients_nothing_is_wrapped():
    model = Llama(SHAPE)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    expected = model(tokens)
    recompute(model, ["blocks.?"])
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


def test_errors():
    with pytest.raises(ValueError, match=r"'\*.experts' matches no module of Llama, expected .* such as 'head'"):
        recompute(Llama(SHAPE), ["*.experts"])
