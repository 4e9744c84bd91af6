import pytest

from llmsys.ops.add_rms_norm import OP, cases
from tests.harness import checks

SURFACE = {"add_rms_norm": "(x, residual, weight, eps=1e-06, *, weight_offset=0.0, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()
