import pytest
import torch
import torch.nn.functional as F

from llmsys import l2_norm
from llmsys._C import cpu
from llmsys.ops._verify import verify
from llmsys.ops.l2_norm import OP, cases
from tests.harness import DTYPES, checks, fused_projection, heads_first, runners, same_bits

SURFACE = {"l2_norm": "(x, eps=1e-12, *, out=None)"}

by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def test_is_torchs_normalize():
    x = torch.randn(4, 33, dtype=torch.float64)
    torch.testing.assert_close(l2_norm(x), F.normalize(x, dim=-1))
    torch.testing.assert_close(l2_norm(x, 7.0), F.normalize(x, dim=-1, eps=7.0))


@by_runner
def test_rows_of_zeros(runner):
    """Nothing to divide by but eps: zeros, and a gradient that is dy / eps."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    x, dy = torch.zeros(3, 19, device=runner.device), torch.randn(3, 19, device=runner.device)
    implementation = OP.implementations[runner.implementation]
    with runner.selected():
        y, length = implementation.forward(x, 1e-3)
        dx = implementation.backward(dy, x, length, 1e-3)
    assert (y == 0).all()
    torch.testing.assert_close(dx, dy / 1e-3)


# ---- heads of a fused projection ----


@by_runner
@pytest.mark.parametrize("layout", [fused_projection, heads_first])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(runner, layout, dtype):
    if runner.why_not:
        pytest.skip(runner.why_not)
    options = {"device": runner.device, "layout": layout}
    with runner.selected():
        for shape in ((2, 3, 4, 33), (1, 5, 2, 64)):
            for verdict in verify(OP, cases, runner.implementation, shape, dtype, **options):
                assert verdict.right, f"{shape}: {verdict}"


# ---- rows beyond registers and caches ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 4096), (5, 4097), (2, 9000)], ids=str)
def test_long_rows(shape, dtype):
    pytest.importorskip("triton")
    for verdict in verify(OP, cases, "triton", shape, dtype, device="cuda" if torch.cuda.is_available() else "cpu"):
        assert verdict.right, verdict


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
def test_large_enough_to_stream(runner):
    """Outputs beyond the last cache take another way to memory."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    times = max(1, cpu.last_level_cache_bytes() // (64 * 1024 * 2))
    x, eps = cases.inputs((64, 1024), torch.bfloat16)
    many = x.repeat(times, 1)
    implementation = OP.implementations["cpu"]
    with runner.selected():
        y, length = implementation.forward(x, eps)
        y_many, length_many = implementation.forward(many, eps)
        dx, dx_many = implementation.backward(x, x, length, eps), implementation.backward(many, many, length_many, eps)
    assert same_bits(y_many, y.repeat(times, 1))
    assert same_bits(dx_many, dx.repeat(times, 1))


X = torch.randn(3, 8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X.long(),), TypeError, "x is torch.int64, expected one of float32"),
        ((torch.tensor(1.0),), ValueError, r"x has no dimension, expected \(..., D\)"),
        ((X[:, :0],), ValueError, r"x has shape \(3, 0\), expected \(..., D\) with D > 0"),
        ((X, 0.0), ValueError, "eps is 0.0, expected a number > 0"),
    ],
)
def test_error(arguments, error, message):
    with pytest.raises(error, match="llmsys.l2_norm: " + message):
        l2_norm(*arguments)
