import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys.ops.gelu import OP, cases
from tests.harness import checks, runners

SURFACE = {"gelu": "(x, *, approximate='none', out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_is_torchs_formula(approximate):
    """Value and gradient, in float64."""
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    y, expected = llmsys.gelu(x, approximate=approximate), F.gelu(x, approximate=approximate)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(z.sum(), x)[0] for z in (y, expected)), rtol=1e-12, atol=1e-14)


def test_another_approximation_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="approximate is 'erf', expected 'none' or 'tanh'"):
        llmsys.gelu(one, approximate="erf")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_is_differentiable_twice(approximate):
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: llmsys.gelu(x, approximate=approximate), x)


@pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradient_of_huge_numbers_is_finite(runner, approximate):
    if runner.why_not:
        pytest.skip(runner.why_not)
    x = torch.tensor([-3e38, -1e20, 1e20, 3e38], device=runner.device)
    with runner.selected():
        dx = OP.implementations[runner.implementation].backward(torch.ones_like(x), x, approximate)
    assert dx.tolist() == [0.0, 0.0, 1.0, 1.0]
