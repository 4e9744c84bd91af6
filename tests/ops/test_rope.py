from functools import partial
from types import SimpleNamespace

import pytest

from llmsys.ops.rope import OP, cases
from tests.harness import checks

interleaved = SimpleNamespace(**{**vars(cases), "inputs": partial(cases.inputs, interleaved=True)})


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("check", checks(OP, interleaved), ids=str)
def test_op_interleaved(check):
    check()
