import pytest
import torch

import llmsys
from llmsys.ops.clamped_swiglu import OP, cases
from tests.harness import checks

SURFACE = {"clamped_swiglu": "(gate, up, *, limit=7.0, alpha=1.702, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def gpt_oss(gate, up, limit, alpha):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


@pytest.mark.parametrize(("limit", "alpha"), [(7.0, 1.702), (2.5, 1.0)])
def test_is_gpt_oss_formula(limit, alpha):
    """Value and gradient, in float64, on both sides of the limits and at them. There the gradient of PyTorch's clamp is
    one thing until 2.13 and another from 2.14 on; ours is what it is just below."""
    gate = torch.linspace(-10, 10, 1001, dtype=torch.float64)
    gate, up = (torch.cat([t, gate.new_tensor([limit, -limit])]) for t in (gate, gate.flip(0) * 1.1))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    y, expected = llmsys.clamped_swiglu(gate, up, limit=limit, alpha=alpha), gpt_oss(gate, up, limit, alpha)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    between = (gate != limit) & (up.abs() != limit)
    for ours, theirs in zip(*(torch.autograd.grad(z.sum(), (gate, up)) for z in (y, expected)), strict=True):
        torch.testing.assert_close(ours[between], theirs[between], rtol=1e-12, atol=1e-14)
    gate = torch.tensor([[limit], [limit - 1e-12]], dtype=torch.float64, requires_grad=True)
    y = llmsys.clamped_swiglu(gate, torch.ones_like(gate), limit=limit, alpha=alpha)
    at_limit, under = torch.autograd.grad(y.sum(), gate)[0]
    torch.testing.assert_close(at_limit, under, rtol=1e-9, atol=0)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_leaves_nothing_is_refused(limit):
    one = torch.ones(1)
    with pytest.raises(ValueError, match=f"limit is {limit}, expected a number > 0"):
        llmsys.clamped_swiglu(one, one, limit=limit)
