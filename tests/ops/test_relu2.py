import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys.ops.relu2 import OP, cases
from tests.harness import checks

SURFACE = {"relu2": "(x, *, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def test_is_torchs_formula():
    """Value and gradient, in float64."""
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    y, expected = llmsys.relu2(x), F.relu(x).square()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(z.sum(), x)[0] for z in (y, expected)), rtol=1e-12, atol=1e-14)
