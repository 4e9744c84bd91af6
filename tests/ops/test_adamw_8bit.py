import math

import pytest
import torch

from llmsys import ops
from llmsys.ops import _verify
from llmsys.ops._op import Impl
from llmsys.ops.adamw import reference as adamw
from llmsys.ops.adamw_8bit import OP, cases
from llmsys.ops.adamw_8bit.dynamic_map import BLOCK, SMALLEST_SCALE, boundaries, decode, encode, numbers, zero_code
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
    "adamw_8bit": "(params, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, masters=(), *, lr, beta1, "
    "beta2, eps, weight_decay, step, grad_scale=None, maximize=False)"
}

TILES = (5000, 33, 2048)  # tensors with whole tiles of a kernel, and with a part of one

runner = every_runner(OP)
dtypes = pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


# ---- the map ----


@signs
def test_map_is_the_papers(signed):
    """0, 1, and the middles of even parts of each decade: 2^i of them to a sign, or twice as many without signs."""
    expected = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        expected += middles + ([-middle for middle in middles] if signed else [])
    expected = torch.tensor(sorted(expected), dtype=torch.float64)
    assert len(expected) == 256
    # Of a float32 step and offset, whose multiple and difference are up to nine times the number.
    torch.testing.assert_close(numbers(signed).double(), expected, rtol=20 * 2**-24, atol=0)


@signs
def test_encode_finds_the_nearest_number(signed):
    values = torch.cat([boundaries(signed) * (1 + shift) for shift in (-1e-9, 1e-9)] + [numbers(signed).double()])
    codes, scales = encode(torch.cat([values.flatten(), torch.ones(-len(values) % BLOCK + BLOCK)]), signed)
    assert (scales[scales < 1] > 0.99).all()
    scaled = values / scales.repeat_interleave(BLOCK)[: len(values)]
    nearest = (scaled[:, None] - numbers(signed).double()).abs().argmin(1)
    assert torch.equal(codes[: len(values)].long(), nearest)


# ---- implementations ----


@dtypes
@pytest.mark.parametrize("variant", cases.VARIANTS, ids=str)
def test_accurate(runner, dtype, variant):
    """Given the same codes, weights, masters and scales are right; new codes are at most one off. Where they are off is
    the next test's.
    """
    for shape in (*(cases.SMALL if not variant else cases.SMALL[-2:]), TILES):
        assert_right(OP, cases, runner, shape, dtype, **variant)


@pytest.mark.parametrize("step", [1, 10])
def test_codes_are_the_nearest(runner, step):
    """A code's number is as near to the moment as the nearest number is, but for twice what the reference's moment
    itself errs in float32, and for the roundings of the place between two numbers, both of which the code moves past:
    of inverse, quotient, slope, intercept, product and sum, each half a unit of at most 1.
    """
    args = cases.inputs((40_000 if runner.implementation == "cpu" else 2000,), torch.float32, runner.device, step=step)
    lists, settings = args[:7], args[7:]
    moments = {}
    for dtype in (torch.float32, torch.float64):
        params, grads, ms, vs, m_scales, v_scales, _ = [[t.to(dtype) for t in ts] for ts in lists]
        m = decode(lists[2][0], m_scales[0], True)
        v = decode(lists[3][0], v_scales[0], False)
        adamw.forward(params, grads, [m], [v], [], *settings, None)
        moments[dtype] = m, v
    call(OP, runner, args)
    for i, signed in ((0, True), (1, False)):
        values = numbers(signed, runner.device).double()
        exact, rounded = moments[torch.float64][i], moments[torch.float32][i]
        scales = args[4 + i][0].double().repeat_interleave(BLOCK)[: len(exact)]
        error = (values[args[2 + i][0].long()] * scales - exact).abs()
        nearest = (values * scales[:, None] - exact[:, None]).abs().amin(1)
        roundings = 2 * 6 * torch.finfo(torch.float32).eps / 2 * scales
        assert (error - nearest <= 2 * (rounded - exact).abs().max() + roundings).all()


@signs
@pytest.mark.parametrize("shift", [-4e-6, 4e-6])
def test_codes_beside_every_boundary(runner, signed, shift):
    """Nearer to one than 4e-6 of it, roundings may decide. Moments of 0 become half a gradient, or its square."""
    y = torch.cat([boundaries(signed) * (1 + shift), torch.ones(1)])
    g = 2 * (y if signed else y.sqrt()).float()
    codes, _ = encode((g / 2).double() if signed else (g.double() / 2) ** 2, signed)
    zeros = [torch.full((256,), zero_code(sign), dtype=torch.uint8) for sign in (True, False)]
    args = [[torch.zeros(256)], [g], *([zero] for zero in zeros), [torch.ones(1)], [torch.ones(1)], []]
    args = mapped(lambda tensor: tensor.to(runner.device), args)
    call(OP, runner, (*args, 0.1, 0.5, 0.75, 1e-8, 0.0, 1, None, False))
    assert torch.equal(args[2 if signed else 3][0].cpu(), codes)


@signs
def test_every_code_is_decoded(runner, signed):
    """With no gradient and beta 1 the moment stays; it moves a weight of 0 by itself."""
    codes = torch.arange(256, dtype=torch.uint8)
    zero = torch.full((256,), zero_code(not signed), dtype=torch.uint8)
    one = torch.ones(1)
    args = [[torch.zeros(256)], [torch.zeros(256)], [codes.clone()], [zero], [one.clone()], [one.clone()], []]
    if not signed:
        args[2], args[3] = [torch.full((256,), 255, dtype=torch.uint8)], [codes.clone()]
    args = mapped(lambda tensor: tensor.to(runner.device), args)
    call(OP, runner, (*args, 1.0, 1 - 2**-40, 1.0 - 2**-40, 1.0, 0.0, 1000, None, False))
    assert torch.equal(args[2 if signed else 3][0].cpu(), codes)
    bias = [1 - (1 - 2**-40) ** 1000] * 2
    value = numbers(signed).double()
    m, v = (value, 0 * value) if signed else (1 + 0 * value, value)
    expected = -m / bias[0] / (v.sqrt() / bias[1] ** 0.5 + 1)
    # Without fused multiply-add the multiple of a step is rounded, up to nine times the number; then a few operations.
    torch.testing.assert_close(args[0][0].double().cpu(), expected, rtol=(9 + 7) * 2**-24, atol=0)


@dtypes
def test_offset_by_one_element_and_nothing_outside_is_written(runner, dtype):
    args = cases.inputs((0, 1, 7, 255, 256, 257, 520), dtype, runner.device, masters=True)
    expected, guarded = copied(args), mapped(fenced, args)
    call(OP, runner, expected)
    call(OP, runner, guarded)
    assert_same_bits(guarded, expected)
    assert_same_bits((guarded[1],), (args[1],))  # grads are only read
    for tensor in tensors_of(guarded):
        assert_fences_stand(tensor)


@pytest.mark.parametrize("layout", [harness.gapped, harness.transposed], ids=lambda layout: layout.__name__)
def test_any_layout_of_weights_and_gradients(runner, layout):
    """Blocks are in row-major order, whatever the order in memory."""
    args = cases.inputs((3, 300), torch.float32, runner.device, masters=True)
    args = tuple([t.view(-1, 3) for t in a] if i in (0, 1, 2, 3, 6) else a for i, a in enumerate(args))
    expected = copied(args)
    strided = tuple([layout(t) for t in a] if i in (0, 1, 6) else a for i, a in enumerate(args))
    call(OP, runner, expected)
    call(OP, runner, strided)
    assert_same_bits(strided, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_poisons_its_block_alone(runner, value):
    args = cases.inputs((600,), torch.float32, runner.device)
    args[1][0][300] = value
    call(OP, runner, args)
    for scales, codes, signed in ((args[4][0], args[2][0], True), (args[5][0], args[3][0], False)):
        assert scales.isnan().tolist() == [False, True, False]
        assert (codes[256:512] == zero_code(signed)).all()
        assert decode(codes, scales, signed).isnan().sum() == BLOCK
    assert args[0][0].isnan().sum() == 1


def test_zero_and_tiny_moments(runner):
    args = cases.inputs((300,), torch.float32, runner.device, lr=0.0)
    for i, code in ((2, 127), (3, 0)):
        args[i][0].fill_(code)
    args[1][0][:256] = 0.0
    args[1][0][256:] = 1e-22
    call(OP, runner, args)
    assert (args[2][0][:256] == 127).all() and (args[3][0] == 0).all()  # squares of 1e-22 are 0 in float32
    assert args[4][0][0] == SMALLEST_SCALE and (args[5][0] == SMALLEST_SCALE).all()
    assert (args[2][0][256:] == 255).all()


@dtypes
def test_same_bits_again_and_with_other_threads(runner, dtype):
    small = range(300 if runner.implementation == "cpu" else 3)  # an interpreter needs seconds for many
    args = cases.inputs(
        (30_000 if runner.implementation == "cpu" else 3000, 5, 0, *small), dtype, runner.device, masters=True
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


def test_verify_catches_codes_two_off(monkeypatch):
    forward = OP.implementations["cpu"].forward

    def wrong(params, grads, exp_avgs, *rest):
        forward(params, grads, exp_avgs, *rest)
        exp_avgs[0][3] += 2

    monkeypatch.setitem(OP.implementations, "wrong", Impl("wrong", wrong))
    verdicts = {v.result: v.right for v in _verify.verify(OP, cases, "wrong", (300,), torch.float32)}
    assert not verdicts.pop("exp_avgs") and all(verdicts.values())


def test_opcheck():
    for variant in ({}, {"masters": True, "grad_scale": 0.5}):
        torch.library.opcheck(OP.node, cases.inputs((5, 300), torch.bfloat16, **variant))


def test_compiles():
    def update(params, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales):
        states = exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales
        ops.adamw_8bit(params, grads, *states, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)

    args = cases.inputs((5, 300), torch.float32)[:6]
    compiled, eager = copied(args), copied(args)
    torch.compile(update, fullgraph=True, backend="aot_eager")(*compiled)
    update(*eager)
    assert_same_bits(compiled, eager)


def lists(**changes):
    args = cases.inputs((300, 3), torch.float32)[:7]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales", "masters")
    given = dict(zip(names, args, strict=True))
    for name, change in changes.items():
        given[name] = [change(tensor) for tensor in given[name]]
    return given.values()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exp_avgs": torch.Tensor.float}, TypeError, r"exp_avgs\[0\] is torch.float32, expected torch.uint8"),
        ({"params": torch.Tensor.double}, TypeError, r"params\[0\] is torch.float64, expected torch.float32 or"),
        (
            {"exp_avg_scales": lambda t: t[:1]},
            ValueError,
            r"exp_avg_scales\[0\] has shape \(1,\) on cpu, expected \(2,\)",
        ),
        ({"exp_avg_sqs": lambda t: torch.stack([t, t], 1)[:, 0]}, ValueError, r"strides \(2,\), expected a contiguous"),
        ({"masters": lambda t: t}, ValueError, "params, .* expected"),
    ],
)
def test_refuses(changes, error, message):
    given = list(lists(**changes))
    if "masters" in changes:
        given[6] = given[0][:1]
    with pytest.raises(error, match="llmsys.adamw_8bit: .*" + message):
        ops.adamw_8bit(*given, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)


def test_traffic():
    args = cases.inputs((256,), torch.bfloat16, masters=True)
    assert cases.traffic("forward", *args) == 256 * (2 + 2 + 8 + 4) + 16
    args = cases.inputs((256,), torch.float32)
    assert cases.traffic("forward", *args) == 256 * (12 + 4) + 16
