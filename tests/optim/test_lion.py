"""llmsys.optim.Lion beside the paper's algorithm."""

import copy

import pytest
import torch

from llmsys.optim import Lion
from tests.optim.training import give_gradients, model, state_of, train


class Paper:
    """Algorithm 2 of arXiv:2302.06675, line by line."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        self.params, self.lr, self.betas, self.weight_decay = list(params), lr, betas, weight_decay
        self.m = [torch.zeros_like(param) for param in self.params]

    @torch.no_grad()
    def step(self):
        beta1, beta2 = self.betas
        for param, m in zip(self.params, self.m, strict=True):
            c = beta1 * m + (1 - beta1) * param.grad
            param -= self.lr * (c.sign() + self.weight_decay * param)
            m.copy_(beta2 * m + (1 - beta2) * param.grad)


@pytest.mark.parametrize("settings", [{}, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.3}], ids=str)
def test_ten_steps_as_the_paper(settings):
    ours, theirs = model(torch.float64), model(torch.float64)
    train(ours, Lion(ours.parameters(), **settings), range(10))
    train(theirs, Paper(theirs.parameters(), **settings), range(10))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_groups_have_their_own_settings():
    net, start = model(torch.float64), model(torch.float64)
    optimizer = Lion([{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}], lr=0.01)
    train(net, optimizer, range(1))
    for layer, lr in ((0, 0.1), (2, 0.01)):
        for a, b in zip(net[layer].parameters(), start[layer].parameters(), strict=True):
            torch.testing.assert_close((a - b).abs(), torch.full_like(a, lr))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": 5}], ids=str)
def test_own_state_dict_continues_exactly(dtype, options):
    net = model(dtype)
    optimizer = Lion(net.parameters(), lr=0.01, **options)
    train(net, optimizer, range(3))
    other, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(3, 6))
    loaded = Lion(other.parameters())
    loaded.load_state_dict(saved)
    train(other, loaded, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_masters_are_a_float32_models_weights():
    net, wide = model(torch.bfloat16), model(torch.bfloat16).float()
    optimizer, wide_optimizer = Lion(net.parameters()), Lion(wide.parameters())
    for step in range(10):
        give_gradients(net, step)
        for narrow, param in zip(net.parameters(), wide.parameters(), strict=True):
            param.grad = narrow.grad.float()
        optimizer.step()
        wide_optimizer.step()
    for param, master, expected in zip(net.parameters(), state_of(optimizer, "master"), wide.parameters(), strict=True):
        assert torch.equal(master, expected) and torch.equal(param, master.bfloat16())


def test_steps_too_small_for_bfloat16_add_up_with_stochastic_rounding():
    param = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    optimizer = Lion([param], lr=2**-12, stochastic_rounding=4)
    for _ in range(50):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert abs(1 - param.double().mean().item() - 50 * 2**-12) < 5 * 2**-8 * (50 * 2**-4 / 10_000) ** 0.5


def test_refuses():
    with pytest.raises(
        ValueError, match=r"llmsys.optim.Lion: betas are \(0.9, 1.0\), expected two numbers from 0 to be"
    ):
        Lion(model().parameters(), betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="llmsys.optim.Lion: lr is -1, expected a number >= 0"):
        Lion(model().parameters(), lr=-1)
    net = model()
    sgd = torch.optim.SGD(net.parameters(), momentum=0.9)
    train(net, sgd, range(1))
    saved = {**Lion(net.parameters()).state_dict(), "state": sgd.state_dict()["state"]}
    with pytest.raises(
        ValueError, match=r"state has \['momentum_buffer'\], expected \['exp_avg'\] too; give the state_d"
    ):
        Lion(net.parameters()).load_state_dict(saved)
