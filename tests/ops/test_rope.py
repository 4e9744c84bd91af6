from functools import partial
from types import SimpleNamespace

import pytest
import torch

from llmsys import rope, rope_tables
from llmsys.ops._verify import verify
from llmsys.ops.rope import OP, cases
from tests.harness import checks, runners, same_bits

interleaved = SimpleNamespace(**{**vars(cases), "inputs": partial(cases.inputs, interleaved=True)})


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("check", checks(OP, interleaved), ids=str)
def test_op_interleaved(check):
    check()
