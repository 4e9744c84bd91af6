"""llmsys.optim.Lamb: beside AdamW, whose direction it scales."""

import copy

import pytest
import torch

from llmsys.optim import AdamW, Lamb
from tests.optim.training import give_gradients, model, state_of, train


def test_a_step_has_the_length_of_the_weights():
    """‖p − p'‖ = lr · ‖p‖, in AdamW's direction where there is no weight decay."""
    ours, theirs, start = (model(torch.float64) for _ in range(3))
    for net, optimizer in (
        (ours, Lamb(ours.parameters(), lr=0.01, weight_decay=0.0, eps=1e-8)),
        (theirs, AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0, eps=1e-8)),
    ):
        train(net, optimizer, range(1))
    for a, b, p in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close((a - p).norm(), 0.01 * p.norm())
        torch.testing.assert_close((a - p) / (a - p).norm(), (b - p) / (b - p).norm())


def test_groups_have_their_own_settings():
    net, start = model(torch.float64), model(torch.float64)
    optimizer = Lamb([{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}], lr=0.01)
    train(net, optimizer, range(1))
    for layer, lr in ((0, 0.1), (2, 0.01)):
        for a, p in zip(net[layer].parameters(), start[layer].parameters(), strict=True):
            torch.testing.assert_close((a - p).norm(), lr * p.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": 5}], ids=str)
def test_own_state_dict_continues_exactly(dtype, options):
    net = model(dtype)
    optimizer = Lamb(net.parameters(), lr=0.01, **options)
    train(net, optimizer, range(3))
    other, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(3, 6))
    loaded = Lamb(other.parameters())
    loaded.load_state_dict(saved)
    train(other, loaded, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_takes_the_moments_of_adamw():
    net = model()
    adamw = torch.optim.AdamW(net.parameters())
    train(net, adamw, range(3))
    optimizer = Lamb(net.parameters())
    optimizer.load_state_dict(adamw.state_dict())
    assert all(state["step"] == 3 for state in optimizer.state.values())
    for ours, theirs in zip(state_of(optimizer, "exp_avg"), state_of(adamw, "exp_avg"), strict=True):
        assert torch.equal(ours, theirs)


def test_masters_are_a_float32_models_weights():
    net, wide = model(torch.bfloat16), model(torch.bfloat16).float()
    optimizer, wide_optimizer = Lamb(net.parameters()), Lamb(wide.parameters())
    for step in range(10):
        give_gradients(net, step)
        for narrow, param in zip(net.parameters(), wide.parameters(), strict=True):
            param.grad = narrow.grad.float()
        optimizer.step()
        wide_optimizer.step()
    masters = state_of(optimizer, "master")
    for param, master, expected in zip(net.parameters(), masters, wide.parameters(), strict=True):
        assert torch.equal(master, expected) and torch.equal(param, master.bfloat16())


def test_refuses():
    with pytest.raises(ValueError, match="llmsys.optim.Lamb: eps is -1, expected a number >= 0"):
        Lamb(model().parameters(), eps=-1)
    with pytest.raises(ValueError, match=r"llmsys.optim.Lamb: betas are \(0.9,\), expected two numbers"):
        Lamb(model().parameters(), betas=(0.9,))
