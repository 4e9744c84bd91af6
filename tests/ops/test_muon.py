import pytest
import torch

from llmsys import ops
from llmsys.ops.muon import OP, cases
from llmsys.ops.muon.reference import orthogonalized
from tests import harness
from tests.harness import DTYPES
from tests.ops.list_ops import assert_right, assert_same_bits, copied

SURFACE = {
    "muon": "(params, grads, momentum_buffers, masters=(), *, lr, adjust_lr_fn='original', momentum=0.95, "
    "weight_decay=0.0, nesterov=True, ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-07, ns_steps=5, "
    "grad_scale=None, maximize=False, stochastic_rounding=None)"
}
COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", cases.VARIANTS, ids=str)
def test_runs(dtype, variant):
    for shape in cases.SMALL:
        assert_right(OP, cases, harness.Runner("reference", "reference"), shape, dtype, **variant)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        for variant in ({}, {"masters": True, "grad_scale": 0.5, "maximize": True}, {"stochastic_rounding": 7}):
            torch.library.opcheck(OP.node, cases.inputs((5, 9), dtype, **variant))


@pytest.mark.parametrize("size", [(40, 40), (40, 90), (90, 40)], ids=str)
def test_singular_vectors_stay_and_singular_values_come_near_one(size):
    """In float64; those that start above 0.01 of the length come out between 0.68 and 1.14."""
    left, _, right = torch.linalg.svd(torch.randn(size, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -1.5, min(size), dtype=torch.float64)
    values /= values.norm()
    found = left.mT @ orthogonalized(left * values @ right, COEFFICIENTS, 1e-7, 5) @ right.mT
    a, b, c = COEFFICIENTS
    expected = values
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(found, expected.diag(), rtol=1e-10, atol=1e-10)
    assert expected[values > 0.01].min() > 0.68 and expected[values > 0.01].max() < 1.14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(dtype):
    args = cases.inputs((9, 16), dtype, columns=24, masters=True, momentum=0.0)
    expected = copied(args)
    OP(*expected)
    for layout in (harness.gapped, harness.transposed):
        strided = tuple([layout(t.clone()) for t in arg] if isinstance(arg, list) else arg for arg in args)
        OP(*strided)
        assert_same_bits(strided, expected)


def test_zeros_move_nothing():
    param = torch.randn(4, 7)
    before = param.clone()
    ops.muon([param], [torch.zeros(4, 7)], [torch.zeros(4, 7)], lr=0.1)
    assert torch.equal(param, before)


def test_a_nan_goes_everywhere():
    param, grad = torch.randn(4, 7), torch.randn(4, 7)
    grad[1, 2] = float("nan")
    ops.muon([param], [grad], [torch.zeros(4, 7)], lr=0.1)
    assert param.isnan().all()


def test_adjustments():
    """Weights move by lr · max(1, √(rows / columns)), or 0.2 · √max(rows, columns), times the same matrix."""
    for shape in ((64, 16), (16, 64)):
        moved = {}
        for name in ("original", "match_rms_adamw"):
            param = torch.zeros(shape)
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            ops.muon([param], [grad], [torch.zeros(shape)], lr=1.0, adjust_lr_fn=name)
            moved[name] = param
        ratio = 0.2 * 8 / max(1, (shape[0] / shape[1]) ** 0.5)
        torch.testing.assert_close(moved["match_rms_adamw"], moved["original"] * ratio)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((3,), {}, r"params\[0\] has shape \(3,\), expected a matrix"),
        ((3, 3), {"adjust_lr_fn": "none"}, "adjust_lr_fn is 'none', expected one of original, match_rms_adamw"),
        ((3, 3), {"masters": [torch.ones(2, 2)]}, r"masters\[0\] has shape \(2, 2\) on cpu, expected \(3, 3\)"),
    ],
    ids=str,
)
def test_refuses(shape, settings, message):
    one = [torch.ones(shape)]
    with pytest.raises(ValueError, match="llmsys.muon: " + message):
        ops.muon(one, one, one, lr=0.1, **settings)


def test_flops():
    args = cases.inputs((10,), torch.float32, columns=30)
    assert cases.flops("forward", *args) == 5 * (4 * 10 * 10 * 30 + 2 * 1000)
