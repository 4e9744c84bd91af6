import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys import lora_linear, lora_merge, lora_unmerge
from llmsys.ops._matmul import torch_matmul
from llmsys.ops.lora_linear import OP, cases, composed
from tests.harness import DTYPES, checks, same_bits

SURFACE = {
    "lora_linear": "(x, weight, lora_a, lora_b, *, scale, bias=None)",
    "lora_merge": "(weight, lora_a, lora_b, *, scale)",
    "lora_unmerge": "(merged, lora_a, lora_b, *, scale, remainder=None)",
}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def arguments(rows=6, inner=8, outer=10, rank=3, dtype=torch.float32):
    x, weight, a, b, bias, *_ = cases.inputs((rows, inner), dtype, columns=outer, rank=rank)
    return {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "scale": 0.5, "bias": bias}


def test_is_the_formula_with_a_merged_weight():
    given = arguments(dtype=torch.float64)
    weight = given["weight"] + 0.5 * given["lora_b"] @ given["lora_a"]
    torch.testing.assert_close(lora_linear(**given), F.linear(given["x"], weight, given["bias"]))
    torch.testing.assert_close(lora_linear(**given | {"bias": None}), F.linear(given["x"], weight))


DXA = ((6, 10), (10, 3))
NEEDED = {  # of rows 6, inner 8, outer 10, rank 3
    "x": [DXA, ((6, 10), (10, 8)), ((6, 3), (3, 8))],
    "weight": [((10, 6), (6, 8))],
    "lora_a": [DXA, ((3, 6), (6, 8))],
    "lora_b": [((10, 6), (6, 3))],
    "bias": [],
}


@pytest.mark.parametrize("trained", NEEDED)
def test_what_is_frozen_costs_no_product(trained, monkeypatch):
    """The gradient of one argument alone is that of all, to the bit, and takes its own products only."""
    made = []
    spy = lambda a, b, *args, **options: made.append((a.shape, b.shape)) or torch_matmul(a, b, *args, **options)  # noqa: E731
    monkeypatch.setitem(OP.implementations, "cpu", composed.implementation("cpu", spy))
    gradients = []
    for needing in (NEEDED, (trained,)):
        given = {n: t.clone().requires_grad_(n in needing) if torch.is_tensor(t) else t for n, t in arguments().items()}
        with llmsys.use(lora_linear="cpu"):
            loss = lora_linear(**given).square().sum()
        made.clear()
        gradients.append(torch.autograd.grad(loss, given[trained])[0])
    assert sorted(made) == sorted(NEEDED[trained])
    assert same_bits(*gradients)


def test_keeps_what_backward_needs():
    given = arguments()
    given["lora_a"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda t: t):
        lora_linear(**given)
    assert sorted(kept) == sorted([(6, 8), (10, 8), (3, 8), (10, 3), (6, 3)])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_unmerge_gives_the_weight_back(dtype, size):
    """To the last bit with the remainder, whatever the update's size; without, within its roundings."""
    given = arguments(outer=40, inner=64, dtype=torch.float64)
    weight, a, b = (given[name].to(dtype) for name in ("weight", "lora_a", "lora_b"))
    scale = size if dtype is not torch.float16 else min(size, 100.0)
    merged, remainder = lora_merge(weight, a, b, scale=scale)
    assert merged.dtype is dtype and remainder.element_size() == weight.element_size()
    assert same_bits(lora_unmerge(merged, a, b, scale=scale, remainder=remainder), weight)
    without = lora_unmerge(merged, a, b, scale=scale).double()
    larger = torch.maximum(weight.double().abs(), merged.double().abs())
    update = scale * (b.double() @ a.double())
    slack = 1e-6 if dtype is not torch.float64 else 1e-15  # of the update's own product
    bound = torch.finfo(dtype).eps * larger + slack * update.abs() + torch.finfo(dtype).smallest_normal
    assert ((without - weight.double()).abs() <= bound).all()


def test_merged_is_rounded_once():
    given = arguments(dtype=torch.float64)
    weight, a, b = (given[name].bfloat16() for name in ("weight", "lora_a", "lora_b"))
    merged, _ = lora_merge(weight, a, b, scale=0.5)
    assert same_bits(merged, (weight.float() + (b.float() @ a.float()) * 0.5).bfloat16())


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": torch.ones(6, 9)}, ValueError, r"x \(6, 9\), weight \(10, 8\), lora_a \(3, 8\).*expected x \(..., K\)"),
        ({"lora_b": torch.ones(10, 4)}, ValueError, r"lora_b \(10, 4\)"),
        ({"bias": torch.ones(9)}, ValueError, r"bias \(9,\), expected"),
        ({"weight": torch.ones(8)}, ValueError, r"weight \(8,\)"),
        ({"lora_a": torch.ones(3, 8).half()}, TypeError, "lora_a is torch.float16, expected torch.float32, as x is"),
        ({"x": torch.ones(6, 8).int()}, TypeError, "x is torch.int32, expected float32"),
        ({"bias": torch.ones(10, device="meta")}, ValueError, "bias is on meta and x on cpu, expected one device"),
    ],
)
def test_error(changed, error, message):
    with pytest.raises(error, match="llmsys.lora_linear: .*" + message):
        lora_linear(**arguments() | changed)


def test_error_of_merge():
    with pytest.raises(ValueError, match=r"llmsys.lora_merge: weight has shape \(4, 5\), lora_a \(2, 6\)"):
        lora_merge(torch.ones(4, 5), torch.ones(2, 6), torch.ones(4, 2), scale=1.0)


def test_merge_refuses_dtypes_and_devices():
    weight, a, b = torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2)
    with pytest.raises(TypeError, match="llmsys.lora_merge: weight is torch.int64, expected float32"):
        lora_merge(weight.long(), a, b, scale=1.0)
    with pytest.raises(ValueError, match="llmsys.lora_merge: lora_a is on meta and weight on cpu"):
        lora_merge(weight, a.to("meta"), b, scale=1.0)
