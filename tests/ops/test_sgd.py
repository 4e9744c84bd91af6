import math

import pytest
import torch

from llmsys import ops
from llmsys.ops.sgd import OP, cases
from tests import harness
from tests.ops.list_ops import (
    assert_fences_stand,
    assert_right,
    assert_same_bits,
    call,
    copied,
    every_runner,
    fenced,
    mapped,
    tensors_of,
)

SURFACE = {
    "sgd": "(params, grads, momentum_buffers=(), masters=(), *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, "
    "nesterov=False, step=1, grad_scale=None, maximize=False)"
}

runner = every_runner(OP)
dtypes = pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("variant", cases.VARIANTS, ids=str)
def test_accurate(runner, dtype, variant):
    for shape in cases.SMALL if not variant else cases.SMALL[-2:]:
        assert_right(OP, cases, runner, shape, dtype, **variant)


@dtypes
def test_offset_by_one_element_and_nothing_outside_is_written(runner, dtype):
    args = cases.inputs((0, 1, 7, 15, 16, 17, 33, 1000), dtype, runner.device, masters=True)
    expected, guarded = copied(args), mapped(fenced, args)
    call(OP, runner, expected)
    call(OP, runner, guarded)
    assert_same_bits(guarded, expected)
    assert_same_bits((guarded[1],), (args[1],))  # grads are only read
    for tensor in tensors_of(guarded):
        assert_fences_stand(tensor)


@pytest.mark.parametrize("layout", [harness.gapped, harness.transposed], ids=lambda layout: layout.__name__)
def test_any_layout(runner, layout):
    args = cases.inputs((3, 21, 48), torch.bfloat16, runner.device, masters=True)
    expected = mapped(lambda tensor: tensor.view(-1, 3).clone(), args)
    strided = mapped(lambda tensor: layout(tensor.view(-1, 3)), args)
    call(OP, runner, expected)
    call(OP, runner, strided)
    assert_same_bits(strided, expected)


@dtypes
def test_special_values(runner, dtype):
    values = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max, 0.0, -0.0])
    for which in range(4):
        args = cases.inputs((40, 9), dtype, runner.device, masters=True)
        for tensor in args[which]:
            tensor[:6] = values.to(tensor)
        expected = copied(args)
        call(OP, runner, args)
        OP.implementations["reference"].forward(*expected)
        for a, b in zip(tensors_of(args), tensors_of(expected), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), f"list {which}"


def test_same_bits_again_and_with_other_threads(runner):
    args = cases.inputs(
        (30_000 if runner.implementation == "cpu" else 3000, 5, 0, 4096), torch.bfloat16, runner.device, masters=True
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            results.append(copied(args))
            call(OP, runner, results[-1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0], other)


# ---- once ----


def test_float64_runs_the_reference():
    args = cases.inputs((5, 3), torch.float64)
    assert OP.select(*args).name == "reference"


def test_opcheck():
    for variant in ({}, {"masters": True, "grad_scale": 0.5, "maximize": True}):
        torch.library.opcheck(OP.node, cases.inputs((5, 9), torch.bfloat16, **variant))


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
