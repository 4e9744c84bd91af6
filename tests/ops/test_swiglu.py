import pytest

from llmsys.ops.swiglu import OP, cases
from tests.harness import checks

SURFACE = {"swiglu": "(gate, up, *, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()
