"""The public surface, held: a name added or taken away is a decision, made here and in CHANGELOG.md."""

import inspect

import pytest

import llmsys

SURFACE = {
    "Explanation": None,
    "adamw": "(params, grads, exp_avgs, exp_avg_sqs, masters=(), *, lr, beta1, beta2, eps, weight_decay, step, "
    "grad_scale=None, maximize=False)",
    "add_rms_norm": "(x, residual, weight, eps=1e-06, *, weight_offset=0.0, out=None)",
    "explain": "(op, *args)",
    "grad_norm": "(tensors)",
    "linear": "(x, weight, bias=None, *, activation=None, residual=None, out=None)",
    "memory": None,
    "nn": None,
    "ops": None,
    "optim": None,
    "rms_norm": "(x, weight, eps=1e-06, *, weight_offset=0.0, out=None)",
    "rope": "(x, cos, sin, *, interleaved=False, out=None)",
    "rope_tables": "(positions, dim, *, base=10000.0, device=None)",
    "swiglu": "(gate, up, *, out=None)",
    "use": "(**implementations)",
}


def test_names():
    assert sorted(llmsys.__all__) == sorted(SURFACE)


@pytest.mark.parametrize("name", [name for name, signature in SURFACE.items() if signature])
def test_signature(name):
    signature = inspect.signature(getattr(llmsys, name))
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(parameters)) == SURFACE[name]


@pytest.mark.parametrize("name", [name for name in llmsys.ops._op.names() if name in llmsys.ops.__all__])
def test_docstring_says_what_a_caller_can_rely_on(name):
    doc = inspect.getdoc(getattr(llmsys, name))
    for section in ("Shapes", "Numerics", "Cost", "Errors", "Source"):
        assert f"\n{section} " in doc, f"{name}: no {section}"
