"""What `append_kv` is measured against writes what it writes, in every mode."""

import pytest
import torch

from benchmarks.contest import Case
from benchmarks.ops import bench_append_kv as bench
from llmsys.ops.append_kv import OP, cases


@pytest.mark.parametrize("mode", ["public", *bench.VARIANTS])
def test_formula(mode):
    args = cases.inputs((2, 3, 20, 2, 16, 8), torch.float32, **bench.VARIANTS.get(mode, {}))
    torch.testing.assert_close(bench.written(bench.formula, args), bench.written(OP, args))


def test_sets_have_places_of_their_own():
    sets = bench.rotation(Case("public", "forward", (64, 2, 7, 8, 64, 64)), "cpu")
    assert [int(args[6][0]) for args in sets[:4]] == [0, 2, 4, 0]
    assert sets[1][2] is sets[0][2] and sets[3][2] is not sets[0][2] and sets[1][0] is not sets[0][0]
