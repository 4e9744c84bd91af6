"""`llmsys.silu` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.silu import OP, cases

BARS = bars.pointwise("silu")


def formula(x):
    return F.silu(x)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_silu(benchmark, contestant):
    benchmark(contestant)
