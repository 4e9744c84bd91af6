"""llmsys.optim.SGD beside torch.optim.SGD."""

import copy
import pickle

import pytest
import torch

from llmsys.optim import SGD
from tests.optim.training import model, state_of, train

SETTINGS = (
    {},
    {"lr": 0.1, "weight_decay": 0.3},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
)


def assert_equal_but_for_rounding(ours, theirs):
    """In float64: a few roundings of each step, of numbers around 1."""
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ten_steps_as_torch(settings):
    ours, theirs = model(torch.float64), model(torch.float64)
    train(ours, SGD(ours.parameters(), **settings), range(10))
    train(theirs, torch.optim.SGD(theirs.parameters(), **settings), range(10))
    assert_equal_but_for_rounding(ours, theirs)
    assert any((a != b).any() for a, b in zip(ours.parameters(), model(torch.float64).parameters(), strict=True))


def test_float32_as_float64():
    """What float32 rounds away in ten steps of 0.1."""
    ours, wide = model(), model(torch.float64)
    wide.load_state_dict(ours.state_dict())
    for net in (ours, wide):
        train(net, SGD(net.parameters(), lr=0.1, momentum=0.9), range(10))
    for a, b in zip(ours.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_groups_and_a_parameter_that_comes_later():
    """A parameter's first gradient is not dampened, whenever it comes."""

    def groups(net):
        return [{"params": net[0].parameters(), "lr": 0.1, "momentum": 0.0}, {"params": net[2].parameters()}]

    ours, theirs = model(torch.float64), model(torch.float64)
    for net, kind in ((ours, SGD), (theirs, torch.optim.SGD)):
        optimizer = kind(groups(net), lr=0.01, momentum=0.9, dampening=0.5)
        net[2].bias.requires_grad_(False)
        net[2].bias.grad = None
        for param in (net[0].weight, net[0].bias, net[2].weight):
            param.grad = torch.ones_like(param)
        optimizer.step()
        net[2].bias.requires_grad_(True)
        train(net, optimizer, range(3))
        optimizer.param_groups[0]["momentum"] = 0.8
        train(net, optimizer, range(3, 6))
    assert_equal_but_for_rounding(ours, theirs)


@pytest.mark.parametrize(("first", "second"), [(SGD, torch.optim.SGD), (torch.optim.SGD, SGD)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_dict_continues_in_the_other(first, second, momentum):
    net, whole = model(torch.float64), model(torch.float64)
    settings = {"lr": 0.02, "momentum": momentum, "dampening": 0.2, "weight_decay": 0.2}
    before = first(net.parameters(), **settings)
    train(net, before, range(4))
    after = second(net.parameters())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(net, after, range(4, 8))
    train(whole, torch.optim.SGD(whole.parameters(), **settings), range(8))
    assert_equal_but_for_rounding(net, whole)


def test_state_dict_looks_like_torchs():
    saved = []
    for kind in (SGD, torch.optim.SGD):
        net = model()
        optimizer = kind(net.parameters(), momentum=0.9)
        train(net, optimizer, range(2))
        saved.append(optimizer.state_dict())
    ours, theirs = saved
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys() == {"momentum_buffer"}
    assert theirs["param_groups"][0].keys() < ours["param_groups"][0].keys()


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": 5}], ids=str)
def test_own_state_dict_and_pickle_continue_exactly(options):
    net = model(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9, **options)
    train(net, optimizer, range(3))
    other, saved, pickled = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict()), pickle.dumps((net, optimizer))
    train(net, optimizer, range(3, 6))
    loaded = SGD(other.parameters())
    loaded.load_state_dict(saved)
    train(other, loaded, range(3, 6))
    unpickled, its_optimizer = pickle.loads(pickled)
    train(unpickled, its_optimizer, range(3, 6))
    for resumed in (other, unpickled):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))


def test_masters_and_closure():
    net = model(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def closure():
        train(net, torch.optim.SGD(net.parameters(), lr=0.0), range(1))  # gives gradients
        return 7

    assert optimizer.step(closure) == 7
    for param, master in zip(net.parameters(), state_of(optimizer, "master"), strict=True):
        assert master.dtype == torch.float32 and torch.equal(param, master.bfloat16())
    assert all(buffer.dtype == torch.float32 for buffer in state_of(optimizer, "momentum_buffer"))
    with pytest.raises(ValueError, match=r"llmsys.optim.SGD.step: closure and grad_scale given, expected one"):
        optimizer.step(closure, grad_scale=torch.ones(()))


def test_stochastic_rounding_has_other_words_each_step():
    """Without a count the same elements would go up at every step, and the mean would not be the parameter."""
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer, steps = SGD([param], lr=2**-12, stochastic_rounding=9), 64
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.step()
    moved = (1 - param.double()) / 2**-8  # a step goes down by one with probability 2⁻⁴
    deviation = (steps * 2**-4 * (1 - 2**-4)) ** 0.5
    assert abs(moved.mean().item() - steps * 2**-4) < 5 * deviation / 64
    assert 0.8 < moved.std().item() / deviation < 1.2
    assert "master" not in optimizer.state[param] and optimizer.state[param]["step"] == steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "lr is -1, expected a number >= 0"),
        ({"momentum": -0.5}, "momentum is -0.5, expected a number >= 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan, expected a number >= 0"),
        ({"nesterov": True}, "nesterov with momentum 0.0 and dampening 0.0, expected momentum > 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov with momentum 0.9 and dampening 0.1"),
        ({"differentiable": True}, "differentiable is True, expected False; torch.optim.SGD has it"),
        ({"stochastic_rounding": -(2**63) - 1}, "stochastic_rounding is -9223372036854775809, expected a seed"),
    ],
    ids=str,
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match="llmsys.optim.SGD: " + message):
        SGD(model().parameters(), **settings)


def test_refuses_buffers_of_another_shape():
    net = model()
    wrong = SGD(net.parameters(), momentum=0.9)
    train(net, wrong, range(1))
    saved = wrong.state_dict()
    saved["state"][0] = {"momentum_buffer": torch.zeros(3)}
    with pytest.raises(
        ValueError, match=r"llmsys.optim.SGD.load_state_dict: momentum_buffer has shape \(3,\), expected"
    ):
        SGD(net.parameters()).load_state_dict(saved)
