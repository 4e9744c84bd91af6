from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmsys import layer_norm
from llmsys._C import cpu
from llmsys.ops._verify import verify
from llmsys.ops.layer_norm import OP, cases
from tests.harness import checks, runners, same_bits

SURFACE = {"layer_norm": "(x, weight=None, bias=None, eps=1e-05, *, out=None)"}

plain = SimpleNamespace(**{**vars(cases), "inputs": partial(cases.inputs, has_weight=False, has_bias=False)})
by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("check", [c for c in checks(OP, plain) if c.dtype == torch.float64], ids=str)
def test_op_without_weight_and_bias(check):
    """Gradients of gradients, the library's node and torch.compile; the rest is a variant of the cases."""
    check()


def test_is_torchs():
    x, weight, bias, eps = cases.inputs((3, 4, 17), torch.float64)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps), F.layer_norm(x, (17,), weight, bias, eps))
    torch.testing.assert_close(layer_norm(x), F.layer_norm(x, (17,)))


@by_runner
def test_far_from_zero(runner):
    """Rows of which only the last three digits differ: what is right is what is right of their distances."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    near = torch.randn(6, 1024, generator=torch.Generator().manual_seed(0)).mul(64).round().to(runner.device)
    far = near + 2.0**17  # exact: both are multiples of one
    with runner.selected():
        y, mean, rstd = OP.implementations[runner.implementation].forward(far, None, None, 1e-5)
    true = F.layer_norm(near.double(), (1024,))
    # A mean of 2^17 summed in float32 by ten halvings errs by up to eleven roundings of 2^-7, 2^-9.5 of the
    # rows' deviation of 64. E[x²] - mean², the other way to the variance, would be wrong in its first digit.
    assert (y.double() - true).abs().max() < 2.0**-9
    torch.testing.assert_close(rstd.double(), near.double().var(-1, correction=0).add(1e-5).rsqrt(), rtol=2e-6, atol=0)


def test_far_from_zero_on_the_cpu_is_as_near():
    """The CPU keeps of the mean what float32 cannot: the rows' distance from zero costs nothing."""
    near = torch.randn(6, 1024, generator=torch.Generator().manual_seed(0)).mul(64).round()
    torch.testing.assert_close(layer_norm(near + 2.0**17), layer_norm(near), rtol=1e-5, atol=1e-6)


@by_runner
def test_constant_rows(runner):
    """Nothing to divide by but eps: exactly the bias."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    x, bias = torch.full((4, 33), 3.7, device=runner.device), torch.randn(33, device=runner.device)
    with runner.selected():
        y = OP.implementations[runner.implementation].forward(x, None, bias, 1e-5)[0]
    torch.testing.assert_close(y, bias.expand(4, 33), rtol=0, atol=2e-4)  # 1/sqrt(eps) times the mean's last bit


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
def test_large_enough_to_stream(runner):
    """Outputs beyond the last cache take another way to memory."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    rows = max(64, cpu.last_level_cache_bytes() // (1024 * 2))
    x, weight, bias, eps = cases.inputs((64, 1024), torch.bfloat16)
    many = x.repeat(rows // 64, 1)
    implementation = OP.implementations["cpu"]
    with runner.selected():
        y, mean, rstd = implementation.forward(x, weight, bias, eps)
        y_many, mean_many, rstd_many = implementation.forward(many, weight, bias, eps)
        dx = implementation.backward(y, x, weight, bias, mean, rstd, eps)[0]
        dx_many = implementation.backward(y_many, many, weight, bias, mean_many, rstd_many, eps)[0]
    assert same_bits(y_many, y.repeat(rows // 64, 1))
    assert same_bits(dx_many, dx.repeat(rows // 64, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 2049), (9, 5120), (3, 8193), (2, 16400)], ids=str)
def test_long_rows(shape, dtype):
    """Read again after the sums, or looped over: lengths on both sides of what fits in registers."""
    pytest.importorskip("triton")
    for verdict in verify(OP, cases, "triton", shape, dtype, device="cuda" if torch.cuda.is_available() else "cpu"):
        assert verdict.right, verdict


X, WEIGHT, BIAS = torch.randn(3, 8), torch.randn(8), torch.randn(8)
ERRORS = {
    "integer_x": ((X.long(),), TypeError, "x is torch.int64, expected one of float32"),
    "scalar": ((torch.tensor(1.0),), ValueError, r"x has no dimension"),
    "empty_rows": ((X[:, :0],), ValueError, r"x has shape \(3, 0\), expected \(..., D\) with D > 0"),
    "weight_dtype": ((X.half(), WEIGHT.bfloat16()), TypeError, r"weight is torch.bfloat16, expected torch.float16"),
    "bias_dtype": ((X, None, BIAS.double()), TypeError, "bias is torch.float64, expected torch.float32"),
    "two_dtypes": ((X.half(), WEIGHT, BIAS.half()), TypeError, "weight is torch.float32 and bias torch.float16"),
    "weight_shape": ((X, WEIGHT[:7]), ValueError, r"x has shape \(3, 8\) and weight \(7,\), expected weight \(8,\)"),
    "bias_shape": ((X, WEIGHT, BIAS[None]), ValueError, r"bias \(1, 8\), expected bias \(8,\)"),
    "device": ((X, WEIGHT.to("meta")), ValueError, "x is on cpu and weight on meta, expected one device"),
    "eps": ((X, WEIGHT, BIAS, -1.0), ValueError, "eps is -1.0, expected a number >= 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    arguments, error, message = ERRORS[name]
    with pytest.raises(error, match="llmsys.layer_norm: .*" + message):
        layer_norm(*arguments)
