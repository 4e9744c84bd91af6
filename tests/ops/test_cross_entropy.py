import math

import pytest
import torch
import torch.nn.functional as F

from llmsys import cross_entropy
from llmsys.ops import _native
from llmsys.ops._verify import verify
from llmsys.ops.cross_entropy import OP, cases, native
from tests.harness import DTYPES, checks, runners, same_bits

SURFACE = {
    "cross_entropy": "(logits, target, weight=None, *, ignore_index=-100, reduction='mean', label_smoothing=0.0, "
    "z_loss=0.0, softcap=0.0, return_lse=False)"
}
by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


# ---- against PyTorch ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_pytorchs(reduction, smoothing, weighted):
    logits, target, weight, *_ = cases.inputs((37, 300), torch.float32, weighted=weighted)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = cross_entropy(ours, target, weight, reduction=reduction, label_smoothing=smoothing)
    wide = None if weight is None else weight.double()
    expected = F.cross_entropy(theirs, target, wide, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)


def test_another_ignore_index():
    logits, target = torch.randn(6, 10), torch.tensor([1, 2, 3, 2, 0, 2])
    loss = cross_entropy(logits, target, ignore_index=2, reduction="none")
    assert loss[target == 2].eq(0).all() and loss[target != 2].gt(0).all()
    torch.testing.assert_close(
        cross_entropy(logits, target, ignore_index=2), F.cross_entropy(logits, target, None, None, 2)
    )


def test_no_row_that_counts():
    logits, target = torch.randn(3, 10, requires_grad=True), torch.full((3,), -100)
    assert cross_entropy(logits, target).isnan() and cross_entropy(logits, target, reduction="sum") == 0
    assert torch.autograd.grad(cross_entropy(logits, target, reduction="sum"), logits)[0].eq(0).all()


# ---- the formula, by hand ----


@by_runner
def test_z_loss_and_softcap(runner):
    if runner.why_not:
        pytest.skip(runner.why_not)
    logits, target = torch.tensor([[1.0, 2.0, -3.0]], device=runner.device), torch.tensor([1], device=runner.device)
    z = [4 * math.tanh(x / 4) for x in (1.0, 2.0, -3.0)]
    lse = math.log(sum(map(math.exp, z)))
    with runner.selected():
        loss, found = OP.implementations[runner.implementation].forward(logits, target, None, -100, 0.0, 0.5, 4.0)
    assert found.item() == pytest.approx(lse, rel=1e-6)
    assert loss.item() == pytest.approx(lse - z[1] + 0.5 * lse**2, rel=1e-6)


def test_lse_has_a_gradient():
    logits = torch.randn(4, 9, requires_grad=True)
    _, lse = cross_entropy(logits, torch.zeros(4, dtype=torch.int64), return_lse=True)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), logits)[0], logits.softmax(-1))


# ---- rows that a kernel meets seldom ----


def climbing(tensor: torch.Tensor) -> torch.Tensor:
    """Each block of a row far above the one before."""
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    return tensor + 100 * (torch.arange(tensor.shape[-1], device=tensor.device) // 1024)


def masked(tensor: torch.Tensor) -> torch.Tensor:
    """The first blocks of each row at -infinity, as a vocabulary's padding may be."""
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    return torch.where(torch.arange(tensor.shape[-1], device=tensor.device) < 1500, -torch.inf, tensor)


def huge(tensor: torch.Tensor) -> torch.Tensor:
    """Beyond what the fast exponential covers."""
    return tensor * 20_000 if tensor.is_floating_point() and tensor.dim() > 1 else tensor


@by_runner
@pytest.mark.parametrize("layout", [climbing, masked, huge])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seldom_rows(runner, layout, dtype):
    if runner.why_not:
        pytest.skip(runner.why_not)
    with runner.selected():
        for verdict in verify(OP, cases, runner.implementation, (3, 3000), dtype, device=runner.device, layout=layout):
            assert verdict.right, verdict


@by_runner
def test_target_out_of_range_is_nan(runner):
    """Where nobody has checked: the row is NaN, the others are what they are, and nothing else is read."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    logits, dloss = torch.randn(4, 40, device=runner.device), torch.ones(4, device=runner.device)
    target = torch.tensor([3, 40, -1, 2**40], device=runner.device)
    implementation = OP.implementations[runner.implementation]
    with runner.selected():
        loss, lse = implementation.forward(logits, target, None, -100, 0.0, 0.0, 0.0)
        dlogits = implementation.backward(dloss, None, logits, target, None, lse, -100, 0.0, 0.0, 0.0)
    assert loss.isnan().tolist() == [False, True, True, True]
    assert dlogits.isnan().all(1).tolist() == [False, True, True, True] and dlogits[0].isfinite().all()


def test_second_derivative_of_an_ignored_row():
    """Is 0, and the others' what it is without that row."""
    logits = torch.randn(3, 5, dtype=torch.float64)
    seconds = []
    for rows, target in ((slice(0, 3), [0, 4, -100]), (slice(0, 2), [0, 4])):
        leaf = logits[rows].clone().requires_grad_()
        (first,) = torch.autograd.grad(cross_entropy(leaf, torch.tensor(target)), leaf, create_graph=True)
        seconds += torch.autograd.grad(first.square().sum(), leaf)
    assert seconds[0][2].eq(0).all()
    torch.testing.assert_close(seconds[0][:2], seconds[1])


# ---- the gradient over the logits, in the forward ----


@pytest.mark.parametrize("options", [(0.0, 0.0, 0.0), (0.1, 1e-2, 5.0)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [7, 33, 2100])
def test_gradient_where_the_logits_lie(classes, dtype, weighted, options):
    logits, target, weight, *_ = cases.inputs((9, classes), dtype, weighted=weighted)
    scale = torch.rand(9)
    loss, lse = OP.implementations["cpu"].forward(logits, target, weight, -100, *options)
    truth = OP.implementations["reference"].backward(
        scale.double(), None, logits.double(), target, weight, lse.double(), -100, *options
    )
    wide = torch.full((9, classes + 5), 77.0, dtype=dtype)
    wide[:, :classes] = logits
    found = native.with_gradient(_native.CPU)(wide[:, :classes], target, weight, scale, -100, *options)
    assert same_bits(found, loss) and (wide[:, classes:] == 77).all()
    # A rounding of the element; near the target, where two numbers of the size of `scale` cancel, a few of float32's.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(wide[:, :classes].double(), truth, rtol=torch.finfo(dtype).eps, atol=16 * eps)


# ---- errors ----

LOGITS, TARGET = torch.randn(3, 8), torch.tensor([0, 7, -100])
ERRORS = {
    "integer_logits": ({"logits": LOGITS.long()}, TypeError, "logits is torch.int64, expected float32"),
    "shape_of_target": ({"target": TARGET[:2]}, ValueError, r"logits has shape \(3, 8\) and target \(2,\), expected"),
    "no_classes": ({"logits": torch.ones(3, 0)}, ValueError, r"logits has shape \(3, 0\)"),
    "dtype_of_target": ({"target": TARGET.int()}, TypeError, "target is torch.int32, expected torch.int64"),
    "device_of_target": ({"target": TARGET.to("meta")}, ValueError, "target is on meta, expected cpu"),
    "too_large_target": ({"target": torch.tensor([0, 8, 1])}, ValueError, "target has 8, expected classes from 0 to 7"),
    "negative_target": (
        {"target": torch.tensor([0, -1, 1])},
        ValueError,
        "target has -1, expected .* ignore_index=-100",
    ),
    "shape_of_weight": ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\) on cpu, expected \(8,\)"),
    "integer_weight": ({"weight": torch.ones(8).long()}, TypeError, "weight is torch.int64, expected a floating"),
    "weight_grad": ({"weight": torch.ones(8, requires_grad=True)}, ValueError, "weight requires a gradient"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected 'mean', 'sum' or 'none'"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5, expected a number from 0 to 1"),
    "z_loss": ({"z_loss": -1.0}, ValueError, "z_loss is -1.0, expected a number >= 0"),
    "softcap": ({"softcap": math.nan}, ValueError, "softcap is nan, expected a number >= 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    changed, error, message = ERRORS[name]
    with pytest.raises(error, match="llmsys.cross_entropy: " + message):
        cross_entropy(**{"logits": LOGITS, "target": TARGET, **changed})


def test_compiles():
    """The public function, its reduction too, in one graph."""
    logits, target = torch.randn(6, 50, requires_grad=True), torch.arange(6)
    compiled = torch.compile(lambda x, t: cross_entropy(x, t, label_smoothing=0.1), fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), cross_entropy(logits, target, label_smoothing=0.1))


def test_one_row_without_a_dimension_of_rows():
    logits, target = torch.randn(5), torch.tensor(2)
    torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target))


def test_refuses_an_ignore_index_that_no_target_has():
    with pytest.raises(
        ValueError, match="llmsys.cross_entropy: ignore_index is .*, expected a number that int64 holds"
    ):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), ignore_index=2**63)
