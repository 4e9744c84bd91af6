import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys import nn
from llmsys.ops import _native
from llmsys.ops._verify import leaves, verify
from llmsys.ops.linear import OP, cases, native, torch_gemm
from tests.harness import DTYPES, checks, runners, same_bits

SURFACE = {"linear": "(x, weight, bias=None, *, activation=None, residual=None, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)
def test_relu2(runner):
    """Where it can run: PyTorch's 16-bit GEMM is too coarse for it."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    for dtype in DTYPES:
        args = cases.inputs((29, 65), dtype, runner.device, activation="relu2", out_features=70)
        if OP.implementations[runner.implementation].reason(runner.device, args):
            continue
        with runner.selected():
            for verdict in verify(
                *(OP, cases, runner.implementation, (29, 65), dtype),
                device=runner.device,
                activation="relu2",
                out_features=70,
                bias=True,
            ):
                assert verdict.right, verdict


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_special_values_through_activations(activation):
    """NaN, infinities and what overflows, before the activation and in its gradient."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0, -0.0, 90.0, -90.0, -110.0]).view(
        -1, 1
    )
    outcomes = []
    for name in ("cpu", "reference"):
        args = leaves(OP, (x, torch.ones(1, 1), None, activation, None))
        with llmsys.use(linear=name):
            y = OP(*args)
        outcomes.append((y.detach(), torch.autograd.grad(y, args[0], torch.ones_like(y))[0]))
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


def test_everything_optional_has_its_gradient():
    """Against autograd through the formula, with each argument alone asking for one."""
    given = cases.inputs((2, 3, 9), torch.float64, out_features=7, bias=True, residual=True, activation="silu")
    x, weight, bias, activation, residual = given
    dy = torch.randn(2, 3, 7, dtype=torch.float64)
    formula = lambda x, weight, bias, residual: F.silu(F.linear(x, weight, bias)) + residual  # noqa: E731
    for alone in range(4):
        tensors = [t.clone().requires_grad_(i == alone) for i, t in enumerate((x, weight, bias, residual))]
        y = llmsys.linear(*tensors[:3], activation="silu", residual=tensors[3])
        (ours,) = torch.autograd.grad(y, tensors[alone], dy)
        (true,) = torch.autograd.grad(formula(*tensors), tensors[alone], dy)
        torch.testing.assert_close(ours, true)
    assert torch.autograd.gradcheck(OP, leaves(OP, given))
    assert torch.autograd.gradgradcheck(OP, leaves(OP, given))


def test_gradients_that_nobody_needs_are_not_computed(monkeypatch):
    needed = []
    backward = OP.implementations["cpu"].backward
    spy = lambda *args, **kwargs: needed.append(args[6:9]) or backward(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(OP.implementations, "cpu", native.Impl("cpu", native.CPU.forward, spy))
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    for trained, expected in ((x, (True, False, False)), (weight, (False, True, False))):
        trained.requires_grad_()
        with llmsys.use(linear="cpu"):
            llmsys.linear(x, weight).sum().backward()
        trained.requires_grad_(False)
        assert needed.pop() == expected


def test_compiles_with_optional_arguments():
    args = leaves(OP, cases.inputs((6, 17), torch.float32, out_features=9, bias=True, residual=True, activation="relu"))
    compiled = torch.compile(lambda *args: OP(*args), fullgraph=True)
    for function in (OP, compiled):
        y = function(*args)
        grads = torch.autograd.grad(y.square().sum(), [args[i] for i in OP.differentiable])
        if function is OP:
            expected = (y, *grads)
    for ours, eager in zip((y, *grads), expected, strict=True):
        assert same_bits(ours, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_know_its_batch(dtype):
    x, weight, bias, *_ = cases.inputs((70, 600), dtype, out_features=40, bias=True)
    whole = llmsys.linear(x, weight, bias, activation="silu")
    for rows in (1, 2, 3, 6, 7, 50):
        assert same_bits(llmsys.linear(x[:rows], weight, bias, activation="silu"), whole[:rows])


def test_no_columns_to_sum_leaves_the_bias():
    bias = torch.randn(5)
    assert same_bits(llmsys.linear(torch.empty(3, 0), torch.empty(5, 0), bias), bias.expand(3, 5))


def test_matrices_are_read_where_they_lie():
    """A transposed matrix is multiplied without a copy."""
    x = torch.randn(30, 20)
    for view in (x, x.t(), x[:, 3:], x[3:].t(), x[:1].expand(4, 20)):
        read, row_stride, col_stride = native.matrix_of(view)
        assert read.data_ptr() == view.data_ptr() and (row_stride, col_stride) == view.stride()
    copy, *strides = native.matrix_of(x[:, ::2])
    assert copy.is_contiguous() and strides == [10, 1]


def test_the_faster_gemm_is_chosen_and_explained(monkeypatch):
    x, weight = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)
    monkeypatch.setattr(_native, "matrix_unit", lambda dtype: "amx_bf16" if dtype == torch.bfloat16 else None)
    explanation = llmsys.explain("linear", x, weight)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == "PyTorch's GEMM is faster in bfloat16 on this CPU, which has amx_bf16"
    assert OP.select(x, weight, None, None, None).name == "torch"
    assert llmsys.explain("linear", x.float(), weight.float()).chosen == "cpu"
    assert llmsys.explain("linear", x, weight, None, "relu2").chosen == "cpu"
    with llmsys.use(linear="cpu"):  # slower is not impossible
        assert OP.select(x, weight, None, None, None).name == "cpu"
        assert llmsys.explain("linear", x, weight).chosen == "cpu"
    monkeypatch.setattr(_native, "matrix_unit", lambda dtype: None)
    assert llmsys.explain("linear", x, weight).chosen == "cpu"
    assert torch_gemm.why_not(x, weight, None, "relu2", None)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 4)}, ValueError, r"x has shape \(2, 4\) and weight \(5, 3\), expected x \(\.\.\., K\)"),
        ({"x": torch.ones(2, 3).long()}, TypeError, "x is torch.int64, expected float32"),
        ({"weight": torch.ones(5, 3).half()}, TypeError, r"weight is torch.float16, expected torch.float32 \(x's\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\) on cpu, expected \(5,\) on cpu"),
        ({"residual": torch.ones(2, 4)}, ValueError, r"residual has shape \(2, 4\) on cpu, expected \(2, 5\) on cpu"),
        ({"activation": "tanh"}, ValueError, r"activation is 'tanh', expected one of \[None, 'relu', 'relu2', 'silu'"),
        ({"out": torch.ones(2, 4)}, ValueError, r"out is \(2, 4\) torch.float32 on cpu"),
    ],
)
def test_says_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=f"llmsys.linear: {message}"):
        llmsys.linear(**{"x": torch.ones(2, 3), "weight": torch.ones(5, 3), **changes})


def test_module():
    """A drop-in for torch.nn.Linear, with the function's finish."""
    ours, theirs = nn.Linear(8, 5, activation="silu"), torch.nn.Linear(8, 5)
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(3, 8), torch.randn(3, 5)
    torch.testing.assert_close(ours(x, residual), F.silu(theirs(x)) + residual)
    assert isinstance(ours, torch.nn.Linear) and "activation='silu'" in repr(ours)
    assert nn.Linear(8, 5, bias=False).bias is None


@pytest.mark.parametrize("op", ["linear", "lora_linear"])
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0)])
@pytest.mark.parametrize("lead", [(), (2,), (0,), (2, 0)], ids=str)
def test_no_features(op, inputs, outputs, lead):
    """Gradients where the product has no element, or is of none."""
    shapes = [(*lead, inputs), (outputs, inputs)] + ([(2, inputs), (outputs, 2)] if op == "lora_linear" else [])
    options = {"activation": "silu"} if op == "linear" else {"scale": 0.5}
    for implementation in ("cpu", "torch", "reference"):
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        bias = torch.randn(outputs, requires_grad=True)
        with llmsys.use(**{op: implementation}):
            y = getattr(llmsys, op)(*tensors, bias=bias, **options)
        y.sum().backward()
        assert y.shape == (*lead, outputs)
        assert all(tensor.grad.shape == tensor.shape for tensor in (*tensors, bias))
