import pytest
import torch

from llmsys import ops
from llmsys.ops.sgd import OP, cases
from tests.ops.list_ops import checks

SURFACE = {
    "sgd": "(params, grads, momentum_buffers=(), masters=(), *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, "
    "nesterov=False, step=1, grad_scale=None, maximize=False, stochastic_rounding=None)"
}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8, "dampening": 0.3, "maximize": True},
    ],
    ids=str,
)
def test_five_steps_as_torch(settings):
    """In float64, where both may round each step a few times."""
    (param,), (grad,) = cases.inputs((300,), torch.float64)[:2]
    theirs = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.05, **settings)
    buffers = [torch.zeros_like(param)] if settings.get("momentum") else []
    for step in range(1, 6):
        theirs.grad = grad * step
        optimizer.step()
        ops.sgd([param], [grad * step], buffers, lr=0.05, step=step, **settings)
    torch.testing.assert_close(param, theirs.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.9}, "momentum is 0.9 with 0 momentum_buffers, expected one for each param"),
        ({"nesterov": True}, "nesterov with momentum 0.0 and dampening 0.0, expected momentum > 0"),
        ({"step": 0}, "step is 0, expected a count from 1"),
    ],
    ids=str,
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match="llmsys.sgd: " + message):
        ops.sgd([torch.ones(3)], [torch.ones(3)], lr=0.1, **settings)
