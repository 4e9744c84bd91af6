"""Gradients that are put off are those of a whole backward, and made once."""

import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys.ops.deferred import deferring


def layers(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {"w": (24, 16), "b": (24,), "gate": (40, 24), "up": (40, 24), "down": (8, 40)}
    return {name: torch.nn.Parameter(torch.randn(shape, dtype=dtype) / 4) for name, shape in shapes.items()}


def model(x, p, activation="gelu"):
    y = llmsys.linear(x, p["w"], p["b"], activation=activation)
    return llmsys.mlp(y, p["gate"], p["up"], p["down"])


def inputs(dtype=torch.float64):
    return torch.randn(2, 5, 16, dtype=dtype, requires_grad=True), torch.randn(2, 5, 8, dtype=dtype)


def whole(x, dy, p, **options):
    return torch.autograd.grad(model(x, p, **options), [x, *p.values()], dy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "forced", [{}, {"mlp": "torch", "linear": "torch"}, {"mlp": "reference", "linear": "reference"}]
)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_equals_a_whole_backward(dtype, forced, activation):
    p, (x, dy) = layers(dtype), inputs(dtype)
    with llmsys.use(**forced):
        expected = whole(x, dy, p, activation=activation)
        with deferring() as later:
            y = model(x, p, activation)
        y.backward(dy)
        assert [name for name, each in p.items() if each.grad is not None] == ["b"]
        assert len(later) == 2
        later.finish()
        assert len(later) == 0
    for found, gradient in zip([x.grad, *(each.grad for each in p.values())], expected, strict=True):
        assert torch.equal(found, gradient)


def test_hooks_run_once_and_later():
    p, (x, dy) = layers(), inputs()
    found = []
    for name, each in p.items():
        each.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
    with deferring() as later:
        y = model(x, p)
    y.backward(dy)
    assert found == ["b"]
    later.finish()
    assert sorted(found) == ["b", "down", "gate", "up", "w"]


def test_adds_to_what_is_there():
    p, (x, dy) = layers(), inputs()
    expected = whole(x, dy, p)
    laters = []
    for _ in range(2):
        with deferring() as later:
            y = model(x, p)
        y.backward(dy)
        laters.append(later)
    for later in laters:
        later.finish()
    torch.testing.assert_close([each.grad for each in p.values()], [2 * gradient for gradient in expected[1:]])


def test_the_graph_is_freed_by_its_backward():
    p, (x, dy) = layers(), inputs()
    with deferring() as later:
        y = model(x, p)
    y.backward(dy)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)
    later.finish()


def test_not_put_off():
    """The weights of an op of which one is no leaf, and the weight of a layer whose input needs no gradient."""
    p, (x, dy) = layers(), inputs()
    with deferring() as later:
        first = llmsys.linear(x.detach(), p["w"])
        y = llmsys.mlp(first, 2 * p["gate"], p["up"], p["down"])
    y.backward(dy)
    assert len(later) == 0
    assert all(p[name].grad is not None for name in ("w", "gate", "up", "down"))


def test_frozen():
    p, (x, dy) = layers(), inputs()
    p["up"].requires_grad_(False)
    with deferring() as later:
        y = model(x, p)
    y.backward(dy)
    later.finish()
    assert [name for name, each in p.items() if each.grad is None] == ["up"]


def test_under_recomputation():
    from torch.utils.checkpoint import checkpoint

    p, (x, dy) = layers(), inputs()
    expected = whole(x, dy, p)
    with deferring() as later:
        y = checkpoint(model, x, p, use_reentrant=False)
    y.backward(dy)
    assert p["w"].grad is None
    later.finish()
    torch.testing.assert_close([each.grad for each in p.values()], list(expected[1:]))


def test_other_ops_are_as_they_were():
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(8))
    with deferring() as later:
        y = llmsys.rms_norm(x, weight) + F.linear(x, torch.eye(8))
    y.sum().backward()
    assert len(later) == 0
    assert weight.grad is not None
