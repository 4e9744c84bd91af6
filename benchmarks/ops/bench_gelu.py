"""`llmsys.gelu` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.gelu import OP, cases

BARS = bars.pointwise("gelu")


def formula(x, approximate):
    return F.gelu(x, approximate=approximate)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_gelu(benchmark, contestant):
    benchmark(contestant)
