import pytest
import torch

from llmsys import ops
from llmsys.ops.lamb import OP, cases
from tests.ops.list_ops import assert_same_bits, call, checks, copied, every_runner

SURFACE = {
    "lamb": "(params, grads, exp_avgs, exp_avg_sqs, masters=(), *, lr, beta1, beta2, eps, weight_decay, step, "
    "grad_scale=None, maximize=False, stochastic_rounding=None)"
}

runner = every_runner(OP)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def test_each_tensor_has_its_own_ratio(runner):
    """Alone or among others, a tensor's bits are the same, over several chunks of the sums too."""
    args = cases.inputs((9000, 5, 0, 4096, 4097), torch.float32, runner.device)
    alone = [tuple([arg[i]] if isinstance(arg, list) and arg else arg for arg in copied(args)) for i in range(5)]
    call(OP, runner, args)
    for i, one in enumerate(alone):
        call(OP, runner, one)
        assert_same_bits(one, tuple([arg[i]] if isinstance(arg, list) and arg else arg for arg in args))


def test_weights_or_direction_of_length_zero(runner):
    """The step is lr times the direction, as Adam's would be."""
    args = cases.inputs((100, 50), torch.float32, runner.device, weight_decay=0.0, lr=0.25, step=1, beta1=0.0, eps=0.0)
    args[0][0].zero_()  # m = g, v = g² · (1 − beta2): the direction is the gradient's sign
    args[3][0].zero_()
    args[1][1].zero_()
    args[3][1].fill_(1.0)
    still = args[0][1].clone()
    call(OP, runner, args)
    torch.testing.assert_close(args[0][0], -0.25 * args[1][0].sign())
    assert torch.equal(args[0][1], still)


# ---- once ----


def test_three_steps_of_the_paper():
    (p,), (g,), (m,), (v,) = cases.inputs((300,), torch.float64)[:4]
    theirs, their_m, their_v = p.clone(), m.clone(), v.clone()
    for step in (1, 2, 3):
        their_m = 0.9 * their_m + 0.1 * g * step
        their_v = 0.99 * their_v + 0.01 * (g * step) ** 2
        ratio = their_m / (1 - 0.9**step) / ((their_v / (1 - 0.99**step)).sqrt() + 1e-6) + 0.3 * theirs
        theirs = theirs - 0.01 * theirs.norm() / ratio.norm() * ratio
        ops.lamb([p], [g * step], [m], [v], lr=0.01, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.3, step=step)
    torch.testing.assert_close(p, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(m, their_m, rtol=1e-13, atol=1e-13)


def test_refuses():
    one = [torch.ones(3)]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="llmsys.lamb: step is 0, expected a count from 1"):
        ops.lamb(one, one, one, one, step=0, **settings)
    with pytest.raises(
        ValueError, match="llmsys.lamb: 1 params, 1 grads, 0 exp_avgs, 1 exp_avg_sqs, expected lists of"
    ):
        ops.lamb(one, one, [], one, step=1, **settings)


def test_traffic():
    args = cases.inputs((10,), torch.bfloat16, masters=True)
    assert cases.traffic("forward", *args) == 10 * (2 + 2 + 3 * 12)
