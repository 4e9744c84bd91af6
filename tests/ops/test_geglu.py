import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys.ops.geglu import OP, cases
from tests.harness import checks

SURFACE = {"geglu": "(gate, up, *, approximate='none', out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_is_torchs_formula(approximate):
    """Value and gradient, in float64; far below zero torch's 1 + tanh cancels, and what is left is off by 2^-53 times
    gate, up and the slope of tanh's argument: up to 8 x 8 x 9.
    """
    gate = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    up = gate.detach().flip(0).requires_grad_()
    y, expected = llmsys.geglu(gate, up, approximate=approximate), F.gelu(gate, approximate=approximate) * up
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(*(torch.autograd.grad(z.sum(), (gate, up)) for z in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_another_approximation_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="approximate is 'erf', expected 'none' or 'tanh'"):
        llmsys.geglu(one, one, approximate="erf")
