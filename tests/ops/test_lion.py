import pytest
import torch

from llmsys import ops
from llmsys.ops.lion import OP, cases
from tests.ops.list_ops import checks

SURFACE = {
    "lion": "(params, grads, exp_avgs, masters=(), *, lr, beta1=0.9, beta2=0.99, weight_decay=0.0, grad_scale=None, "
    "maximize=False, stochastic_rounding=None)"
}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def test_formula_of_the_paper():
    (p,), (g,), (m,) = cases.inputs((300,), torch.float64)[:3]
    expected_p = p - 0.01 * (torch.sign(0.9 * m + 0.1 * g) + 0.3 * p)
    expected_m = 0.99 * m + 0.01 * g
    ops.lion([p], [g], [m], lr=0.01, weight_decay=0.3)
    torch.testing.assert_close(p, expected_p, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(m, expected_m, rtol=1e-14, atol=1e-14)


def test_refuses():
    with pytest.raises(ValueError, match="llmsys.lion: 1 params, 1 grads, 0 exp_avgs, expected lists of one length"):
        ops.lion([torch.ones(3)], [torch.ones(3)], [], lr=0.1)
