import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from llmsys import _C, ops
from llmsys.ops.adamw import OP, cases
from tests import harness
from tests.ops.list_ops import assert_right, assert_same_bits, call, checks, copied, every_runner, tensors_of

SURFACE = {
    "adamw": "(params, grads, exp_avgs, exp_avg_sqs, masters=(), *, lr, beta1, beta2, eps, weight_decay, step, "
    "grad_scale=None, maximize=False, stochastic_rounding=None)"
}

runner = every_runner(OP)
dtypes = pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@dtypes
@pytest.mark.parametrize("grad_dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize("masters", [False, True])
def test_every_pair_of_dtypes(runner, dtype, grad_dtype, masters):
    assert_right(OP, cases, runner, (1, 33, 70), dtype, grad_dtype=grad_dtype, masters=masters)


def repeated(tensor):
    return tensor[:1].expand(tensor.shape).view(-1, 3)


def test_expanded_gradients(runner):
    params, grads, *rest = cases.inputs((3, 21), torch.float32, runner.device)
    grads = [repeated(grad) for grad in grads]
    args = ([p.view(-1, 3) for p in params], grads, *(([t.view(-1, 3) for t in ts]) for ts in rest[:3]), *rest[3:])
    expected = (args[0], [grad.clone() for grad in grads], *args[2:])
    expected = copied(expected)
    call(OP, runner, expected)
    call(OP, runner, args)
    assert_same_bits(args, expected)


def test_nan_scale_poisons_everything(runner):
    args = cases.inputs((40, 9), torch.float32, runner.device, grad_scale=math.nan)
    call(OP, runner, args)
    assert all(tensor.isnan().all() for tensor in tensors_of((args[0], args[2], args[3])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_keeps_what_rounding_loses(runner, dtype):
    """Steps too small to move a 16-bit weight add up in its master."""
    for masters in (False, True):
        args = cases.inputs((64,), dtype, runner.device, masters=masters, lr=1e-4, weight_decay=0.0)
        for tensor in tensors_of(args):
            tensor.fill_(1.0)
        for _ in range(30):
            call(OP, runner, args)
        assert ((args[0][0] == 1) != masters).all()
    assert torch.equal(args[0][0], args[4][0].to(dtype))


def test_ten_thousand_tensors_with_one_gradient_scale(runner):
    shape = (3,) * (10_000 if runner.implementation == "cpu" else 20)
    args = cases.inputs(shape, torch.float32, runner.device, grad_scale=0.5)
    expected = copied(args)
    call(OP, runner, args)
    OP.implementations["reference"].forward(*expected)
    torch.testing.assert_close(torch.cat(tensors_of(args)), torch.cat(tensors_of(expected)))


# ---- once ----


def test_torch_sees_the_change():
    args = cases.inputs((5, 3), torch.float32)
    before = [tensor._version for tensor in args[0]]
    OP(*args)
    assert all(tensor._version > version for tensor, version in zip(args[0], before, strict=True))


def test_compiles_for_every_step_without_recompiling():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def update(params, grads, exp_avgs, exp_avg_sqs, step, grad_scale):
        ops.adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            lr=1e-2,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            step=step,
            grad_scale=grad_scale,
        )

    args = cases.inputs((40, 9), torch.float32, grad_scale=0.5)
    compiled, eager = copied(args), copied(args)
    for step in range(1, 7):
        update(*compiled[:4], step, args[11])
        OP(*eager[:4], [], 1e-2, 0.9, 0.95, 1e-8, 0.1, step, args[11], False, None)
        assert_same_bits(compiled, eager)
    assert counter.frame_count <= 2  # the first step's, then one for any step


def test_names_what_it_runs_on():
    args = cases.inputs((5,), torch.float32)
    assert ops.explain("adamw", *args).chosen == "cpu"
    assert _C.cpu.isa() in _C.cpu.isas()


def keywords(**changes):
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    return {**settings, **changes}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, g, m, v, w: g.pop(), ValueError, "2 params, 1 grads, 2 exp_avgs, 2 exp_avg_sqs, expected lists of"),
        (lambda p, g, m, v, w: w.append(p[0]), ValueError, "1 masters, expected lists of one length, or no masters"),
        (lambda p, g, m, v, w: p.clear(), ValueError, "0 params, 2 grads"),
        (
            lambda p, g, m, v, w: v.__setitem__(1, v[1][:2]),
            ValueError,
            r"exp_avg_sqs\[1\] has shape \(2,\) on cpu, exp",
        ),
        (lambda p, g, m, v, w: m.__setitem__(0, m[0].bfloat16()), TypeError, r"exp_avgs\[0\] is torch.bfloat16, expec"),
        (
            lambda p, g, m, v, w: g.__setitem__(0, g[0].long()),
            TypeError,
            r"grads\[0\] is torch.int64, expected torch.f",
        ),
        (
            lambda p, g, m, v, w: p.__setitem__(0, p[0].long()),
            TypeError,
            r"params\[0\] is torch.int64, expected torch.",
        ),
        (
            lambda p, g, m, v, w: p.__setitem__(1, p[1].half()),
            TypeError,
            r"params\[1\] is torch.float16, .* once for ea",
        ),
        (lambda p, g, m, v, w: g.__setitem__(1, g[1].double()), TypeError, r"grads\[1\] is torch.float64, expected"),
        (lambda p, g, m, v, w: g.__setitem__(1, g[1].to("meta")), ValueError, r"grads\[1\] has .* on meta, expected"),
    ],
)
def test_refuses(change, error, message):
    lists = [list(tensors) for tensors in cases.inputs((5, 3), torch.float32)[:5]]
    change(*lists)
    with pytest.raises(error, match="llmsys.adamw: .*" + message):
        ops.adamw(*lists, **keywords())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grad_scale": 0.5}, TypeError, "grad_scale is a float, expected a tensor of shape"),
        ({"step": 0}, ValueError, "step is 0, expected a count from 1"),
        ({"beta1": -1.0}, ValueError, r"beta1 is -1.0, expected a number in \[0, 1\)"),
        ({"beta2": 1.0}, ValueError, r"beta2 is 1.0, expected a number in \[0, 1\)"),
        ({"grad_scale": torch.ones(1)}, ValueError, r"grad_scale has shape \(1,\) on cpu, expected \(\) on cpu"),
        (
            {"grad_scale": torch.ones((), dtype=torch.int64)},
            TypeError,
            "grad_scale is torch.int64, expected torch.float",
        ),
        ({"grad_scale": torch.ones((), device="meta")}, ValueError, r"on meta, expected \(\) on cpu"),
    ],
)
def test_refuses_settings(changes, error, message):
    lists = cases.inputs((5, 3), torch.float32)[:5]
    with pytest.raises(error, match="llmsys.adamw: .*" + message):
        ops.adamw(*lists, **keywords(**changes))


def test_no_tensors_at_all():
    assert ops.adamw([], [], [], [], **keywords()) is None


def test_parameters_that_require_grad_are_updated_in_place():
    param = torch.ones(5, requires_grad=True)
    ops.adamw([param], [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)], **keywords(lr=0.5))
    assert (param < 0.6).all() and param.is_leaf


def test_traffic_and_flops():
    args = cases.inputs((10,), torch.bfloat16, masters=True)
    assert cases.traffic("forward", *args) == 10 * (2 + 2 + 3 * 8)
    args = cases.inputs((10,), torch.float32)
    assert cases.traffic("forward", *args) == 10 * (4 + 3 * 8)
    assert cases.flops("forward", *args) == 140
