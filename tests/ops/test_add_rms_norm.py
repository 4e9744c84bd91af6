from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llmsys.ops._verify import verify
from llmsys.ops.add_rms_norm import OP, cases, reference
from tests.harness import checks

SURFACE = {"add_rms_norm": "(x, residual, weight, eps=1e-06, *, weight_offset=0.0, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("factor, right", [(1.0, True), (1.0001, False)])
def test_rows_of_one_element_are_judged_by_how_much_was_lost(monkeypatch, factor, right):
    """There, dx is what rounding leaves of a difference of equals, and of 32 draws that with the smallest sum decides:
    in each of these lots the reference happens to be nearly exact on it."""

    def backward(dy, dsum, sum, weight, rstd, eps, weight_offset, out=None):
        """The sum of products in another order."""
        weighted, rstd = dy * weight, rstd.unsqueeze(-1)
        along = (weighted * sum).mean(-1, keepdim=True) * rstd * rstd * rstd
        dx = weighted * rstd - factor * sum * along + (0 if dsum is None else dsum)
        return dx, reference.backward(dy, dsum, sum, weight, rstd, eps, weight_offset)[1]

    monkeypatch.setitem(OP.implementations, "other", replace(OP.implementations["reference"], backward=backward))
    verdicts = []
    for first in (4000, 5000):
        later = SimpleNamespace(inputs=lambda *args, first=first: cases.inputs(*args[:3], args[3] + first))
        verdicts += [v for v in verify(OP, later, "other", (1, 1), torch.float32) if v.result == "dx"]
    assert len(verdicts) == 2 and all(verdict.right == right for verdict in verdicts)
