"""llmsys/ops/_matmul.py: the products, and the rule that says whose."""

from itertools import product

import pytest
import torch

import llmsys
from llmsys import _C
from llmsys.ops import _matmul, _native
from llmsys.ops._native import ISAS, instruction_set
from tests.harness import DTYPES, guarded_allocations, same_bits

RULE = _matmul.by_rule(_native.CPU)
WAYS = {"own": _matmul.implementation(_native.CPU), "torch": _matmul.torch_matmul, "by the rule": RULE}
WIDTHS = ((1, 1, 1), (3, 5, 7), (19, 37, 130), (2, 300, 40), (33, 17, 0))


def matrices(rows, cols, depth, dtype):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, depth), (depth, cols), (rows, cols))
    ]


def assert_right(found, a, b, start, scale):
    """Within the worst case of sums in float32, and two roundings: PyTorch rounds before it scales."""
    a, b, start = a.double(), b.double(), start.double()
    true, magnitude = start + scale * (a @ b), start.abs() + scale * (a.abs() @ b.abs())
    bound = (a.shape[1] + 3) * 2.0**-24 * magnitude + torch.finfo(found.dtype).eps * (magnitude + true.abs())
    assert ((found.double() - true).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_is_the_product(way, dtype):
    for size, scale, add in product(WIDTHS, (1.0, 0.3), (False, True)):
        a, b, start = matrices(*size, dtype)
        wide = torch.full((size[0] + 2, size[1] + 3), 77.0, dtype=dtype)
        out = wide[1:-1, :-3].copy_(start) if add else wide[1:-1, :-3].fill_(float("nan"))
        assert WAYS[way](a, b, out, add=add, scale=scale) is out
        assert_right(out, a, b, start if add else torch.zeros(()), scale)
        assert (wide[[0, -1]] == 77).all() and (wide[:, -3:] == 77).all(), "written outside"
        if not add:
            with guarded_allocations():
                assert_right(WAYS[way](a, b, scale=scale), a, b, torch.zeros(()), scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_sums_in_float32(isa, dtype, monkeypatch):
    """Whatever is the faster one."""
    if isa not in _C.cpu.isas():
        pytest.skip(f"this machine cannot run {isa}")
    monkeypatch.setattr(_native, "matrix_unit", lambda dtype: "amx")
    a, b, _ = matrices(30, 40, 500, dtype)
    start = torch.randn(30, 40)
    with instruction_set(isa):
        for way in WAYS.values():
            assert_right(way(a, b, start.clone(), add=True, scale=0.5), a, b, start, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_any_strides(dtype):
    a, b, _ = matrices(20, 30, 41, dtype)
    expected = WAYS["own"](a, b)
    left = (a, a.T.contiguous().T, torch.cat([a, a], 1)[:, :41], a.repeat_interleave(2, 1)[:, ::2])
    right = (b, b.T.contiguous().T, torch.cat([b, b], 1)[:, :30], b.repeat_interleave(2, 1)[:, ::2])
    for x, y in product(left, right):
        assert same_bits(WAYS["own"](x, y), expected)
    assert same_bits(WAYS["own"](a[:1].expand(5, 41), b), expected[:1].expand(5, 30))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_know_its_batch(dtype):
    a, b, start = matrices(70, 40, 600, dtype)
    whole = WAYS["own"](a, b, start.clone(), add=True)
    for rows in (1, 2, 13, 14, 15, 50):
        assert same_bits(WAYS["own"](a[:rows], b, start[:rows].clone(), add=True), whole[:rows])


EXAMPLES = {
    "linear": lambda x, w: (x, w),
    "mlp": lambda x, w: (x, w, w, w),
    "lora_linear": lambda x, w: (x, w, w, w),
}


@pytest.mark.parametrize("op", EXAMPLES)
def test_one_rule_for_every_op(op, monkeypatch):
    """Each op that multiplies matrices gets llmsys's GEMM but where PyTorch's is faster, and says so."""
    bfloat16, float32 = (EXAMPLES[op](*torch.ones(2, 4, 4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert llmsys.explain(op, *float32).chosen == "cpu"
    monkeypatch.setattr(_native, "matrix_unit", lambda dtype: "amx_bf16" if dtype == torch.bfloat16 else None)
    explanation = llmsys.explain(op, *bfloat16)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == "PyTorch's GEMM is faster in bfloat16 on this CPU, which has amx_bf16"
    assert llmsys.explain(op, *float32).chosen == "cpu"
    assert llmsys.explain(op, *(tensor.double() for tensor in float32)).chosen == "torch"
    monkeypatch.setattr(_native, "matrix_unit", lambda dtype: None)
    assert llmsys.explain(op, *bfloat16).chosen == "cpu"


def test_the_rule_by_itself(monkeypatch):
    """Own where it is as fast, or the product is wanted wider than the matrices."""
    a, b, _ = matrices(40, 50, 700, torch.bfloat16)
    used = []
    monkeypatch.setattr(_matmul, "implementation", lambda kernels: lambda *args, **options: used.append("own"))
    monkeypatch.setattr(_matmul, "torch_matmul", lambda *args, **options: used.append("torch"))
    matmul = _matmul.by_rule(_native.CPU)
    for unit, out in product(("amx_bf16", None), (None, torch.empty(40, 50))):
        monkeypatch.setattr(_native, "matrix_unit", lambda dtype, unit=unit: unit)
        matmul(a, b, out)
        assert used.pop() == ("own" if unit is None or out is not None else "torch")
