"""`llmsys.relu2` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.relu2 import OP, cases

BARS = bars.pointwise("relu2")


def formula(x):
    return F.relu(x).square()


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_relu2(benchmark, contestant):
    benchmark(contestant)
