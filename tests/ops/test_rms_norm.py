import pytest

from llmsys.ops.rms_norm import OP, cases
from tests.harness import checks

SURFACE = {"rms_norm": "(x, weight, eps=1e-06, *, weight_offset=0.0, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()
