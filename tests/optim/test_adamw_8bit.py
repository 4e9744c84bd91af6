"""llmsys.optim.AdamW8bit beside AdamW."""

import copy

import pytest
import torch

from llmsys.ops._cases import random
from llmsys.optim import AdamW, AdamW8bit


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 65), torch.nn.Tanh(), torch.nn.Linear(65, 63)).to(dtype)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """The last loss of learning a fixed map."""
    x, y = random(0, "cpu", ((256, 64), torch.float32), ((256, 63), torch.float32))
    dtype = next(net.parameters()).dtype
    for _ in steps:
        loss = (net(x.to(dtype)).float() - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_large_tensors_take_bytes_and_small_ones_float32():
    net = model()
    optimizer = AdamW8bit(net.parameters())
    train(net, optimizer, range(2))
    for param in net.parameters():
        state = optimizer.state[param]
        large = param.numel() >= 4096
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (torch.uint8 if large else torch.float32)
        assert ("exp_avg_scale" in state) == large
    assert sum(param.numel() >= 4096 for param in net.parameters()) == 1  # 64 × 65; 65 × 63 is one short


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_within_one_percent_of_wide_states(dtype):
    losses = []
    for kind in (AdamW, AdamW8bit):
        net = model(dtype)
        start = train(net, kind(net.parameters(), lr=0.0), range(1))
        losses.append(train(net, kind(net.parameters(), lr=3e-3), range(100)))
    assert losses[0] < 0.5 * start
    assert abs(losses[1] / losses[0] - 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_state_dict_continues_exactly(dtype):
    net = model(dtype)
    optimizer = AdamW8bit(net.parameters(), lr=0.01)
    train(net, optimizer, range(3))
    other, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(3))
    resumed = AdamW8bit(other.parameters())
    resumed.load_state_dict(saved)
    train(other, resumed, range(3))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW])
def test_wide_states_are_encoded(kind):
    net = model()
    wide = kind(net.parameters())
    train(net, wide, range(3))
    narrow = AdamW8bit(net.parameters())
    narrow.load_state_dict(wide.state_dict())
    large = net[0].weight
    assert narrow.state[large]["exp_avg"].dtype == torch.uint8 and narrow.state[large]["step"] == 3
    train(net, narrow, range(2))


def test_adamw_refuses_bytes():
    net = model()
    optimizer = AdamW8bit(net.parameters())
    train(net, optimizer, range(1))
    with pytest.raises(
        ValueError, match="exp_avg is torch.uint8, expected a float dtype; llmsys.optim.AdamW8bit takes"
    ):
        AdamW(net.parameters()).load_state_dict(optimizer.state_dict())


def test_transposed_parameters():
    """Blocks are in row-major order of the parameter, however it lies in memory."""
    weights = random(0, "cpu", ((80, 70), torch.float32))[0]
    params = [torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.t().contiguous().t())]
    for param in params:
        optimizer = AdamW8bit([param], lr=0.1)
        for seed in range(3):
            param.grad = random(seed, "cpu", ((80, 70), torch.float32))[0]
            optimizer.step()
    assert torch.equal(*params) and params[1].stride() == (1, 80)


def test_refuses_stochastic_rounding():
    with pytest.raises(
        ValueError, match=r"llmsys.optim.AdamW8bit: stochastic_rounding is 3, expected None; llmsys.opti"
    ):
        AdamW8bit(model().parameters(), stochastic_rounding=3)
