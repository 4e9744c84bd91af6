"""Gradients that products add where they are summed: right for every implementation, and where all of it is wanted."""

from functools import partial

import pytest
import torch

import llmsys
from llmsys.ops.deferred import deferring
from llmsys.ops.sink import Sink
from tests.ops.test_deferred import inputs, layers, model, whole

WEIGHTS = ("w", "gate", "up", "down")
SCALE = 0.5


class Sums:
    """What arrived for each weight, times SCALE, on top of what was there: ones."""

    def __init__(self, p, names=WEIGHTS, adds_up=True):
        self.of = {name: torch.ones_like(p[name], requires_grad=False) for name in names}
        self.times = dict.fromkeys(names, 0)
        for name in names:
            Sink(p[name], partial(self.add, name), lambda *_: None, lambda: True, lambda: adds_up).attach()

    def add(self, name, product):
        product.add_to(self.of[name], SCALE)
        self.times[name] += 1

    def check(self, expected):
        for name, found in self.of.items():
            tolerance = 4 * torch.finfo(found.dtype).eps * (1 + expected[name].abs().max())
            torch.testing.assert_close(found, 1 + SCALE * expected[name], rtol=0, atol=float(tolerance), msg=name)


@pytest.mark.parametrize("wait", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forced", [{}, {"mlp": "torch", "linear": "torch"}])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_equals_autograd(forced, dtype, activation, wait):
    p, (x, dy) = layers(dtype), inputs(dtype)
    with llmsys.use(**forced):
        expected = dict(zip(["x", *p], whole(x, dy, p, activation=activation), strict=True))
        sums = Sums(p)
        with deferring() as later:
            y = model(x, p, activation)
        if not wait:
            y = model(x, p, activation)
        y.backward(dy)
        assert sums.times == dict.fromkeys(WEIGHTS, 0 if wait else 1)
        if wait:
            later.finish()
    assert sums.times == dict.fromkeys(WEIGHTS, 1)
    sums.check(expected)
    assert torch.equal(x.grad, expected["x"]) and torch.equal(p["b"].grad, expected["b"])
    assert all(p[name].grad is None for name in WEIGHTS)


def test_nodes_run():
    """What waits for a weight's gradient hears that it is there."""
    p, (x, dy) = layers(), inputs()
    arrived = {}
    for name, each in p.items():
        node = torch.autograd.graph.get_gradient_edge(each).node
        node.register_hook(lambda _, found, name=name: arrived.update({name: found[0]}))
        p[name].node = node  # held, it stays the same
    Sums(p)
    model(x, p).backward(dy)
    assert arrived.keys() == p.keys()
    assert [name for name, found in arrived.items() if found is not None] == ["b"]


def test_some_of_an_op():
    """One weight has a sink, one is frozen, and those without a sink, or watched, give their gradients to autograd."""
    p, (x, dy) = layers(), inputs()
    expected = dict(zip(["x", *p], whole(x, dy, p), strict=True))
    sums = Sums(p, ("gate", "w"))
    p["up"].requires_grad_(False)
    p["w"].register_hook(lambda gradient: None)
    model(x, p).backward(dy)
    assert sums.times == {"gate": 1, "w": 0}
    assert [name for name, each in p.items() if each.grad is not None] == ["w", "b", "down"]
    for name in ("w", "b", "down"):
        assert torch.equal(p[name].grad, expected[name])


@pytest.mark.parametrize("why", ["reference", "nothing adds up", "create_graph"])
def test_left_to_autograd(why):
    p, (x, dy) = layers(), inputs()
    expected = dict(zip(["x", *p], whole(x, dy, p), strict=True))
    sums = Sums(p, adds_up=why != "nothing adds up")
    with llmsys.use(**({"mlp": "reference", "linear": "reference"} if why == "reference" else {})):
        model(x, p).backward(dy, create_graph=why == "create_graph")
    assert sums.times == dict.fromkeys(WEIGHTS, 0)
    torch.testing.assert_close({name: each.grad for name, each in p.items()}, {name: expected[name] for name in p})


def test_no_rows():
    p = layers()
    sums = Sums(p)
    x = torch.zeros(0, 16, dtype=torch.float64, requires_grad=True)
    model(x, p).backward(torch.zeros(0, 8, dtype=torch.float64))
    sums.check({name: torch.zeros_like(p[name]) for name in WEIGHTS})
