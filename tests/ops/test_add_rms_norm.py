import pytest

from llmsys.ops.add_rms_norm import OP, cases
from tests.harness import checks


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()
