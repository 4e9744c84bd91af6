import math

import pytest
import torch

from llmsys import ops
from llmsys.ops.grad_norm import OP, cases
from tests import harness
from tests.harness import same_bits
from tests.ops.list_ops import assert_right, assert_same_bits, call, copied, every_runner, fenced, mapped

SURFACE = {"grad_norm": "(tensors)"}

runner = every_runner(OP)
dtypes = pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("variant", cases.VARIANTS, ids=str)
def test_accurate(runner, dtype, variant):
    if dtype == torch.float16:
        variant = {name: value**0.25 for name, value in variant.items()}  # in the dtype's range
    for shape in cases.SMALL:
        assert_right(OP, cases, runner, shape, dtype, **variant)


def test_mixed_dtypes(runner):
    tensors = [tensor for dtype in harness.DTYPES for tensor in cases.inputs((5, 4097, 31), dtype, runner.device)[0]]
    expected = torch.cat([tensor.double() for tensor in tensors]).norm()
    torch.testing.assert_close(call(OP, runner, (tensors,)).double(), expected, rtol=1e-6, atol=0)


@dtypes
def test_any_layout(runner, dtype):
    args = cases.inputs((3, 21, 4800), dtype, runner.device)
    expected = call(OP, runner, args)
    assert same_bits(call(OP, runner, mapped(fenced, args)), expected)
    for layout in (harness.gapped, harness.transposed):
        strided = mapped(lambda tensor, layout=layout: layout(tensor.view(-1, 3)), args)
        assert (call(OP, runner, strided) - expected).abs() <= 2e-7 * expected
    expanded = torch.full((1,), 2.0, dtype=dtype, device=runner.device).expand(100)
    assert call(OP, runner, ([expanded],)) == 20


@dtypes
def test_special_values(runner, dtype):
    for value in (math.nan, math.inf, -math.inf):
        args = cases.inputs((40, 9), dtype, runner.device)
        args[0][1][8] = value
        norm = call(OP, runner, args)
        assert norm.isnan() if math.isnan(value) else norm == math.inf


@dtypes
def test_same_bits_again_and_with_other_threads_and_inputs_stay(runner, dtype):
    many = range(3 if runner.slow else 300)
    args = cases.inputs((70_000, 5, 0, 4096, *many), dtype, runner.device)
    before, threads, results = copied(args), torch.get_num_threads(), []
    try:
        for count in (threads, threads, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(OP, runner, args))
    finally:
        torch.set_num_threads(threads)
    if runner.implementation != "reference":  # PyTorch promises less
        assert all(same_bits(result, results[0]) for result in results)
    assert_same_bits(args, before)


def test_sum_of_many_squares_beyond_float32(runner):
    """Sums of chunks are float64: what overflows float32 only in the sum does not overflow."""
    tensors = [torch.full((4096,), 2.5e17, device=runner.device)] * 4
    norm = call(OP, runner, (tensors,))
    worst = 4096 * 2**-24  # of adding one tensor's squares one after another in float32
    torch.testing.assert_close(norm.cpu(), torch.tensor(3.2e19), rtol=worst, atol=0)


# ---- once ----


def test_float64():
    tensors = [torch.ones(3, dtype=torch.float64), torch.ones(1)]
    norm = ops.grad_norm(tensors)
    torch.testing.assert_close(norm, torch.tensor(2.0, dtype=torch.float64))
    one_of_them = [torch.ones(1), *tensors]
    refuse = {name for name, implementation in OP.implementations.items() if implementation.why_not(one_of_them)}
    assert refuse == {*OP.implementations} - {"reference"}


def test_no_tensors():
    assert ops.grad_norm([]) == 0


@dtypes
def test_opcheck(dtype):
    torch.library.opcheck(OP.node, cases.inputs((5, 9), dtype))


def test_compiles():
    args = cases.inputs((40, 9), torch.float32)
    compiled = torch.compile(lambda tensors: ops.grad_norm(tensors) * 1, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*args), OP(*args))


def test_refuses():
    with pytest.raises(TypeError, match=r"llmsys.grad_norm: tensors\[1\] is torch.int64, expected one of"):
        ops.grad_norm([torch.ones(1), torch.ones(1, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"llmsys.grad_norm: tensors\[1\] is on meta and tensors\[0\] on cpu"):
        ops.grad_norm([torch.ones(1), torch.ones(1, device="meta")])


def test_traffic_and_flops():
    args = cases.inputs((10, 3), torch.bfloat16)
    assert cases.traffic("forward", *args) == 26
    assert cases.flops("forward", *args) == 26
