"""`llmsys.reglu` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.reglu import OP, cases

BARS = bars.pointwise("reglu")


def formula(gate, up):
    return F.relu(gate) * up


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_reglu(benchmark, contestant):
    benchmark(contestant)
