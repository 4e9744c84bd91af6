"""The op contract: selection, forcing, explaining, gradients, graphs, and what a caller gets wrong."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llmsys
from llmsys.ops import _op
from llmsys.ops._op import Impl, Op
from llmsys.ops._schema import REQUIRED, Schema

X, WEIGHT = torch.randn(3, 8), torch.randn(8)


@pytest.fixture(autouse=True)
def ops_of_their_own(monkeypatch):
    """What a test here defines, other tests do not find among llmsys's ops."""
    monkeypatch.setattr(_op, "_ops", dict(_op._ops))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={"PATH": "", **environment}, capture_output=True, text=True)


# ---- schema ----


def test_schema_reads_names_types_and_defaults():
    schema = Schema("(Tensor x, Tensor? bias, Tensor(a!)[] out, float eps=1e-6) -> (Tensor y, Tensor rstd)")
    assert schema.names == ("x", "bias", "out", "eps")
    assert [argument.type for argument in schema.arguments] == ["Tensor", "Tensor?", "Tensor[]", "float"]
    assert [argument.default for argument in schema.arguments] == [REQUIRED, REQUIRED, REQUIRED, 1e-6]
    assert schema.results == ("y", "rstd")


# ---- selection ----


def test_selection_takes_the_first_that_can():
    assert llmsys.explain("rms_norm", X, WEIGHT).chosen == "cpu"
    assert llmsys.explain("rms_norm", X.double(), WEIGHT.double()).chosen == "reference"


def test_explain_gives_every_reason():
    explanation = llmsys.explain("rms_norm", X.double(), WEIGHT.double())
    assert explanation.reasons["cpu"] == "no kernel for torch.float64"
    assert explanation.reasons["cuda"] == "runs on cuda tensors, given cpu"
    assert "reference  chosen" in str(explanation)


def test_explain_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"llmsys.rms_norm: 1 arguments given, expected \(Tensor x, Tensor weight"):
        llmsys.explain("rms_norm", X)
    with pytest.raises(ValueError, match=r"llmsys.ops.get: 'rmsnorm', expected one of \['adamw'"):
        llmsys.explain("rmsnorm", X)


def test_forcing_by_context():
    with llmsys.use(rms_norm="reference"):
        assert llmsys.explain("rms_norm", X, WEIGHT).chosen == "reference"
        with llmsys.use(rms_norm="cpu", swiglu="reference"):
            assert llmsys.explain("rms_norm", X, WEIGHT).chosen == "cpu"
        assert llmsys.explain("swiglu", X, X).chosen == "cpu"
    assert llmsys.explain("rms_norm", X, WEIGHT).chosen == "cpu"


def test_forced_one_that_cannot_run_says_why():
    with llmsys.use(rms_norm="cpu"), pytest.raises(RuntimeError, match="forced to 'cpu', which cannot run: no kernel"):
        llmsys.rms_norm(X.double(), WEIGHT.double())


def test_forcing_what_does_not_exist():
    with pytest.raises(ValueError, match=r"rms_norm='fast', expected one of \['cuda', 'cpu', 'triton', 'reference'"):
        llmsys.use(rms_norm="fast").__enter__()
    with pytest.raises(ValueError, match="'norm', expected one of"):
        llmsys.use(norm="cpu").__enter__()


def test_forcing_by_environment():
    code = "import torch, llmsys; x = torch.ones(2, 8); print(llmsys.explain('rms_norm', x, x[0]).chosen)"
    assert run_python(code, LLMSYS_IMPL="rms_norm=reference").stdout.strip() == "reference"
    assert "expected op=implementation" in run_python(code, LLMSYS_IMPL="rms_norm").stderr
    assert "expected one of" in run_python(code, LLMSYS_IMPL="rms_norm=fast").stderr


def test_choices_are_printed_once_when_asked():
    code = "import torch, llmsys; x = torch.ones(2, 8); [llmsys.rms_norm(x, x[0]) for _ in range(3)]"
    assert run_python(code, LLMSYS_EXPLAIN="1").stdout.count("rms_norm: cpu") == 1


def test_all_refuse():
    op = Op(
        "refusing", "(Tensor x) -> (Tensor y)", None, [Impl("reference", lambda x: x, None, lambda x: "never runs")]
    )
    with pytest.raises(RuntimeError, match="no implementation can run\n(.*\n)*  reference  never runs"):
        op(X)


# ---- gradients ----


def test_backward_keeps_the_forwards_implementation():
    leaf = X.clone().requires_grad_()
    with llmsys.use(rms_norm="reference"):
        y = llmsys.rms_norm(leaf, WEIGHT)
    assert y.grad_fn.implementation.name == "reference"


def test_gradient_of_the_gradient():
    leaf = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(llmsys.rms_norm(leaf, WEIGHT).sin().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), leaf)
    wide = X.double().requires_grad_()
    plain = torch.nn.functional.rms_norm(wide, (8,), WEIGHT.double(), 1e-6)
    (expected,) = torch.autograd.grad(plain.sin().sum(), wide, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-5)


def test_torch_func():
    plain = torch.func.grad(lambda x: torch.nn.functional.rms_norm(x, (8,), WEIGHT, 1e-6).sin().sum())(X)
    torch.testing.assert_close(torch.func.grad(lambda x: llmsys.rms_norm(x, WEIGHT).sin().sum())(X), plain)
    torch.testing.assert_close(torch.vmap(lambda x: llmsys.rms_norm(x, WEIGHT))(X), llmsys.rms_norm(X, WEIGHT))


def test_tensor_that_may_be_none():
    def backward(dy, x, scale):
        return (dy, None) if scale is None else (dy * scale, (dy * x).sum(0))

    op = Op(
        "scaled_if_asked",
        "(Tensor x, Tensor? scale=None) -> (Tensor y)",
        "(Tensor dy, Tensor x, Tensor? scale) -> (Tensor dx, Tensor dscale)",
        [Impl("reference", lambda x, scale: x.clone() if scale is None else x * scale, backward)],
    )
    for function in (op, torch.compile(lambda *args: op(*args), fullgraph=True)):
        for scale in (WEIGHT.clone().requires_grad_(), None):
            x = X.clone().requires_grad_()
            leaves = [x] if scale is None else [x, scale]
            plain = (x if scale is None else x * scale).sin().sum()
            given = torch.autograd.grad(function(x, scale).sin().sum(), leaves)
            torch.testing.assert_close(given, torch.autograd.grad(plain, leaves))
    assert op.explain(X).chosen == "reference"


def test_out_while_recording_is_refused():
    with pytest.raises(ValueError, match="out= given while a gradient is recorded"):
        llmsys.rms_norm(X.clone().requires_grad_(), WEIGHT, out=torch.empty_like(X))


def test_out_that_does_not_fit():
    for out in (torch.empty(3, 9), torch.empty(3, 8).double(), torch.empty(8, 3).t()):
        with pytest.raises(ValueError, match="llmsys.rms_norm: out is .* expected contiguous \\(3, 8\\) torch.float32"):
            llmsys.rms_norm(X, WEIGHT, out=out)
        with llmsys.use(rms_norm="reference"), pytest.raises(ValueError, match="llmsys.rms_norm: out is"):
            llmsys.rms_norm(X, WEIGHT, out=out)


# ---- graphs and subclasses ----


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode() as mode:
        y = llmsys.rms_norm(mode.from_tensor(X), mode.from_tensor(WEIGHT))
    assert (y.shape, y.dtype, y.stride()) == (X.shape, X.dtype, X.stride())


def test_meta_tensors_run_nothing():
    assert llmsys.rms_norm(X.to("meta"), WEIGHT.to("meta")).shape == X.shape


def test_export():
    class Norm(torch.nn.Module):
        def forward(self, x, weight):
            return llmsys.rms_norm(x, weight)

    exported = torch.export.export(Norm(), (X, WEIGHT))
    assert "llmsys.rms_norm" in str(exported.graph)
    torch.testing.assert_close(exported.module()(X, WEIGHT), llmsys.rms_norm(X, WEIGHT))


def test_out_under_compile_is_refused():
    with pytest.raises(Exception, match="out= given under torch.compile"):
        torch.compile(llmsys.rms_norm, fullgraph=True)(X, WEIGHT, out=torch.empty_like(X))


# ---- the caller's mistakes ----

MISTAKES = [
    (
        lambda: llmsys.rms_norm(X, torch.ones(7)),
        ValueError,
        r"x has shape \(3, 8\) and weight \(7,\), expected x \(\.\.\., D\)",
    ),
    (lambda: llmsys.rms_norm(X, torch.ones(1, 8)), ValueError, r"weight \(1, 8\), expected"),
    (lambda: llmsys.rms_norm(torch.ones(3, 0), torch.ones(0)), ValueError, "with D > 0"),
    (lambda: llmsys.rms_norm(torch.tensor(1.0), torch.ones(1)), ValueError, r"x has shape \(\)"),
    (lambda: llmsys.rms_norm(X.long(), WEIGHT), TypeError, "x is torch.int64, expected one of float32"),
    (lambda: llmsys.rms_norm(X, WEIGHT.half()), TypeError, "weight is torch.float16, expected torch.float32"),
    (lambda: llmsys.rms_norm(X, WEIGHT.to("meta")), ValueError, "x is on cpu and weight on meta, expected one device"),
    (lambda: llmsys.rms_norm(X, WEIGHT, -1.0), ValueError, "eps is -1.0, expected a number >= 0"),
    (lambda: llmsys.rms_norm(X, WEIGHT, float("nan")), ValueError, "eps is nan"),
    (
        lambda: llmsys.add_rms_norm(X, X[:2], WEIGHT),
        ValueError,
        r"residual has shape \(2, 8\) on cpu, expected \(3, 8\)",
    ),
    (lambda: llmsys.add_rms_norm(X, X.half(), WEIGHT), TypeError, "residual is torch.float16, expected torch.float32"),
    (lambda: llmsys.swiglu(X, X[:, :4]), ValueError, r"up has shape \(3, 4\) on cpu, expected \(3, 8\)"),
    (lambda: llmsys.swiglu(X, X.bfloat16()), TypeError, "up is torch.bfloat16, expected torch.float32, as gate is"),
    (lambda: llmsys.swiglu(X.int(), X.int()), TypeError, "gate is torch.int32, expected one of"),
    (lambda: llmsys.swiglu(X, X.to("meta")), ValueError, "on meta, expected .* on cpu"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES, ids=[message[:32] for *_, message in MISTAKES])
def test_mistakes_are_explained(call, error, message):
    with pytest.raises(error, match=r"^llmsys\.\w+: .*" + message):
        call()


def test_nan_goes_through():
    x = X.clone()
    x[1, 2] = float("nan")
    assert torch.equal(llmsys.rms_norm(x, WEIGHT).isnan().any(-1), torch.tensor([False, True, False]))


# ---- tensors that are minus what is in memory, as the imaginary part of a conjugate is ----


def negated(tensor):
    return torch._neg_view(-tensor)


def test_negated_views_are_read_as_what_they_are():
    x, weight, dy = torch.randn(3, 5), torch.randn(5), torch.randn(3, 5)
    assert torch.equal(llmsys.rms_norm(negated(x), negated(weight)), llmsys.rms_norm(x, weight))
    gradients = []
    for same in (negated, lambda tensor: tensor):
        leaf = x.clone().requires_grad_()
        llmsys.rms_norm(leaf, weight).backward(same(dy))
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_negated_gradients_of_an_optimizer():
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
    grad, params = torch.randn(7), [torch.ones(7), torch.ones(7)]
    for param, given in zip(params, (grad, negated(grad)), strict=True):
        llmsys.ops.lion([param], [given], [torch.zeros(7)], **settings)
    assert torch.equal(*params)


def test_negated_out_is_refused():
    with pytest.raises(ValueError, match="negated, expected contiguous"):
        llmsys.silu(torch.ones(5), out=negated(torch.ones(5)))
    with pytest.raises(ValueError, match="or for a negated view"):
        llmsys.silu(negated(torch.ones(5)), out=torch.ones(5))
