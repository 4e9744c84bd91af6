"""`llmsys.geglu` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.geglu import OP, cases

BARS = bars.pointwise("geglu")


def formula(gate, up, approximate):
    return F.gelu(gate, approximate=approximate) * up


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_geglu(benchmark, contestant):
    benchmark(contestant)
