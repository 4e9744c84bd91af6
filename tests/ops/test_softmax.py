import math

import pytest
import torch

from llmsys import softmax
from llmsys._C import cpu
from llmsys.ops._verify import verify
from llmsys.ops.softmax import OP, cases
from tests.harness import DTYPES, checks, fused_projection, heads_first, runners, same_bits

SURFACE = {"softmax": "(x, *, out=None)"}

by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def test_is_torchs_softmax():
    x = torch.randn(4, 33, dtype=torch.float64)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1))


@by_runner
@pytest.mark.parametrize("dim", [1, 5, 40, 5000], ids=str)
def test_hidden_elements_and_rows_without_any(runner, dim):
    """Zeros where x is -infinity; NaN in a row of nothing else, and of a NaN or +infinity, as torch has it."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    x = torch.randn(6, dim, device=runner.device)
    x[0] = -math.inf
    x[1, : dim - 1] = -math.inf
    x[2, dim // 2] = math.nan
    x[3, dim // 2] = math.inf
    x[4] = 1e30  # far beyond where e^x is finite
    with runner.selected():
        y = OP.implementations[runner.implementation].forward(x)
    assert y[[0, 2, 3]].isnan().all()
    assert y[1, dim - 1] == 1 and (y[1, : dim - 1] == 0).all()
    torch.testing.assert_close(y[4], torch.full_like(y[4], 1 / dim))
    torch.testing.assert_close(y[5].sum(), y.new_ones(()))


@by_runner
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_has_the_bits_it_has_among_others(runner, dtype):
    if runner.why_not:
        pytest.skip(runner.why_not)
    x, dy = torch.randn(2, 17, 333, device=runner.device).to(dtype)
    implementation = OP.implementations[runner.implementation]
    with runner.selected():
        y = implementation.forward(x)
        dx = implementation.backward(dy, y)
        for row in (0, 9, 16):
            assert same_bits(implementation.forward(x[row]), y[row])
            assert same_bits(implementation.backward(dy[row : row + 1], y[row : row + 1])[0], dx[row])


@by_runner
@pytest.mark.parametrize("layout", [fused_projection, heads_first])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_two_distances(runner, layout, dtype):
    if runner.why_not:
        pytest.skip(runner.why_not)
    options = {"device": runner.device, "layout": layout}
    with runner.selected():
        for shape in ((2, 3, 4, 33), (1, 5, 2, 64)):
            for verdict in verify(OP, cases, runner.implementation, shape, dtype, **options):
                assert verdict.right, f"{shape}: {verdict}"


# ---- rows beyond registers and caches ----


@by_runner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 4096), (5, 4097), (2, 9000)], ids=str)
def test_long_rows(runner, shape, dtype):
    if runner.why_not:
        pytest.skip(runner.why_not)
    with runner.selected():
        for verdict in verify(OP, cases, runner.implementation, shape, dtype, device=runner.device):
            assert verdict.right, verdict


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
def test_large_enough_to_stream(runner):
    """Outputs beyond the last cache take another way to memory."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    times = max(1, cpu.last_level_cache_bytes() // (64 * 1024 * 2))
    (x,) = cases.inputs((64, 1024), torch.bfloat16)
    implementation = OP.implementations["cpu"]
    with runner.selected():
        y, y_many = implementation.forward(x), implementation.forward(x.repeat(times, 1))
        dx, dx_many = implementation.backward(x, y), implementation.backward(x.repeat(times, 1), y_many)
    assert same_bits(y_many, y.repeat(times, 1))
    assert same_bits(dx_many, dx.repeat(times, 1))


X = torch.randn(3, 8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": X.long()}, TypeError, "x is torch.int64, expected one of float32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has no dimension, expected \(..., D\)"),
        ({"x": X[:, :0]}, ValueError, r"x has shape \(3, 0\), expected \(..., D\) with D > 0"),
        ({"x": X, "out": X.half()}, ValueError, r"out is \(3, 8\) torch.float16"),
    ],
)
def test_error(arguments, error, message):
    with pytest.raises(error, match="llmsys.softmax: " + message):
        softmax(**arguments)
