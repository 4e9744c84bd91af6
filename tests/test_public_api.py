"""The public surface, held: a name added or taken away is a decision, made here (for an op, in the SURFACE of its test)
and in CHANGELOG.md.
"""

import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import llmsys

ROOMS = {"memory", "nn", "ops", "optim"}
OP_TESTS = [import_module(f"tests.ops.{path.stem}") for path in sorted(Path(__file__).parent.glob("ops/test_*.py"))]
SURFACE = {
    "Explanation": None,
    "accelerate": "(model, *, only=None, exclude=())",
    "explain": "(op, *args)",
    "restore": "(model)",
    "use": "(**implementations)",
}
for module in OP_TESTS:
    SURFACE |= getattr(module, "SURFACE", {})


def test_names():
    public = {name for name, value in vars(llmsys).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert sorted(public) == sorted(SURFACE)


def test_rooms():
    """Of the rooms, these are promised at `import llmsys`; another may be there because these need it."""
    assert set(vars(llmsys)) >= ROOMS


@pytest.mark.parametrize("name", [name for name, signature in SURFACE.items() if signature])
def test_signature(name):
    signature = inspect.signature(getattr(llmsys, name))
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(parameters)) == SURFACE[name]


@pytest.mark.parametrize("name", [name for name in llmsys.ops._op.names() if name in SURFACE])
def test_docstring_says_what_a_caller_can_rely_on(name):
    doc = inspect.getdoc(getattr(llmsys, name))
    for section in ("Shapes", "Numerics", "Cost", "Errors", "Source"):
        assert f"\n{section} " in doc, f"{name}: no {section}"
