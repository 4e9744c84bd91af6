"""llmsys.optim.Muon beside torch.optim.Muon."""

import copy

import pytest
import torch

from llmsys.optim import Muon
from tests.optim.training import give_gradients, state_of, train

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(9, 33, bias=False), torch.nn.Tanh(), torch.nn.Linear(33, 33, bias=False))
    return torch.nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.05, "weight_decay": 0.3, "nesterov": False},
        {"momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "original", "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    ],
    ids=str,
)
def test_ten_steps_as_torch(settings):
    """Bit for bit: the same operations, in the same order."""
    ours, theirs = model(), model()
    train(ours, Muon(ours.parameters(), **settings), range(10))
    train(theirs, torch.optim.Muon(theirs.parameters(), **settings), range(10))
    for a, b, start in zip(ours.parameters(), theirs.parameters(), model().parameters(), strict=True):
        assert torch.equal(a, b) and (a != start).any()


@pytest.mark.parametrize(("first", "second"), [(Muon, "torch"), ("torch", Muon)])
def test_state_dict_continues_in_the_other(first, second):
    first, second = (torch.optim.Muon if kind == "torch" else kind for kind in (first, second))
    net, whole = model(), model()
    before = first(net.parameters(), lr=0.02, momentum=0.8)
    train(net, before, range(4))
    after = second(net.parameters())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(net, after, range(4, 8))
    train(whole, torch.optim.Muon(whole.parameters(), lr=0.02, momentum=0.8), range(8))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": 5}], ids=str)
def test_own_state_dict_continues_exactly(options):
    net = model(torch.bfloat16)
    optimizer = Muon(net.parameters(), lr=0.01, **options)
    train(net, optimizer, range(3))
    other, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(3, 6))
    loaded = Muon(other.parameters())
    loaded.load_state_dict(saved)
    train(other, loaded, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_masters_are_a_float32_models_weights():
    net, wide = model(torch.bfloat16), model(torch.bfloat16).float()
    optimizer, wide_optimizer = Muon(net.parameters()), Muon(wide.parameters())
    for step in range(5):
        give_gradients(net, step)
        for narrow, param in zip(net.parameters(), wide.parameters(), strict=True):
            param.grad = narrow.grad.float()
        optimizer.step()
        wide_optimizer.step()
    masters = state_of(optimizer, "master")
    for param, master, expected in zip(net.parameters(), masters, wide.parameters(), strict=True):
        assert torch.equal(master, expected) and torch.equal(param, master.bfloat16())


def test_refuses():
    with pytest.raises(
        ValueError, match=r"llmsys.optim.Muon: parameter 1 of a group has shape \(5,\), expected a matri"
    ):
        Muon(torch.nn.Linear(5, 5).parameters())
    for settings, message in (
        ({"ns_steps": 100}, "ns_steps is 100, expected a count below 100"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients are \(1.0, 2.0\), expected three numbers"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn is 'none', expected None or one of original, match_rms_adamw"),
        ({"momentum": -1}, "momentum is -1, expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match="llmsys.optim.Muon: " + message):
            Muon(model().parameters(), **settings)
