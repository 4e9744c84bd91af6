from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmsys import group_norm
from llmsys._C import cpu
from llmsys.ops.group_norm import OP, cases
from tests.harness import checks, runners, same_bits

SURFACE = {"group_norm": "(x, num_groups, weight=None, bias=None, eps=1e-05, *, out=None)"}

plain = SimpleNamespace(**{**vars(cases), "inputs": partial(cases.inputs, has_weight=False, has_bias=False)})


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("check", [c for c in checks(OP, plain) if c.dtype == torch.float64], ids=str)
def test_op_without_weight_and_bias(check):
    """Gradients of gradients, the library's node and torch.compile; the rest is a variant of the cases."""
    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_torchs(dtype):
    x, num_groups, weight, bias, eps = cases.inputs((3, 6, 5, 7), dtype)
    torch.testing.assert_close(
        group_norm(x, num_groups, weight, bias, eps), F.group_norm(x, num_groups, weight, bias, eps)
    )
    torch.testing.assert_close(group_norm(x, 3), F.group_norm(x, 3))


@pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)
def test_groups_do_not_see_each_other(runner):
    """One group and one sample changed: the same bits everywhere else. A sample alone: the same bits too."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    x, num_groups, weight, bias, eps = cases.inputs((3, 8, 37), torch.float32, runner.device, num_groups=4)
    other = x.clone()
    other[1, 2:4] += 5.0
    with runner.selected():
        forward = OP.implementations[runner.implementation].forward
        y, y_other = (forward(given, num_groups, weight, bias, eps)[0] for given in (x, other))
        alone = forward(x[1:2], num_groups, weight, bias, eps)[0]
    assert same_bits(alone, y[1:2])
    changed = (y != y_other).flatten(2).any(-1)
    assert changed[1, 2:4].all() and changed.sum() == 2


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
def test_large_enough_to_stream(runner):
    """Outputs beyond the last cache take another way to memory."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    samples = max(2, cpu.last_level_cache_bytes() // (64 * 1024 * 2) + 1)
    x, num_groups, weight, bias, eps = cases.inputs((1, 64, 1024), torch.bfloat16)
    many = x.repeat(samples, 1, 1)
    implementation = OP.implementations["cpu"]
    with runner.selected():
        y, mean, rstd = implementation.forward(x, num_groups, weight, bias, eps)
        y_many, *of_many = implementation.forward(many, num_groups, weight, bias, eps)
        dx = implementation.backward(y, x, num_groups, weight, bias, mean, rstd, eps)[0]
        dx_many = implementation.backward(y_many, many, num_groups, weight, bias, *of_many, eps)[0]
    assert same_bits(y_many, y.repeat(samples, 1, 1))
    assert same_bits(dx_many, dx.repeat(samples, 1, 1))


X, WEIGHT = torch.randn(3, 8, 5), torch.randn(8)
ERRORS = {
    "integer_x": ((X.long(), 2), TypeError, "x is torch.int64, expected one of float32"),
    "one_dimension": ((WEIGHT, 2), ValueError, r"x has shape \(8,\), expected \(N, C, ...\)"),
    "nothing_in_a_channel": ((X[:, :, :0], 2), ValueError, r"x has shape \(3, 8, 0\), expected .* nothing empty but N"),
    "groups": ((X, 3), ValueError, "3 groups of 8 channels, expected a divisor of them"),
    "no_groups": ((X, 0), ValueError, "0 groups of 8 channels"),
    "weight_shape": (
        (X, 2, WEIGHT[:5]),
        ValueError,
        r"weight \(5,\), expected weight \(8,\)",
    ),
    "bias_dtype": ((X, 2, None, WEIGHT.double()), TypeError, "bias is torch.float64, expected torch.float32"),
    "eps": ((X, 2, None, None, float("nan")), ValueError, "eps is nan, expected a number >= 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    arguments, error, message = ERRORS[name]
    with pytest.raises(error, match="llmsys.group_norm: .*" + message):
        group_norm(*arguments)
