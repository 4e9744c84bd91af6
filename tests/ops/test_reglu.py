import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys.ops.reglu import OP, cases
from tests.harness import checks

SURFACE = {"reglu": "(gate, up, *, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def test_is_torchs_formula():
    """Value and gradient, in float64."""
    gate = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    up = gate.detach().flip(0).requires_grad_()
    y, expected = llmsys.reglu(gate, up), F.relu(gate) * up
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(*(torch.autograd.grad(z.sum(), (gate, up)) for z in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
