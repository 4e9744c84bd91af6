"""`llmsys.swiglu` against PyTorch and whatever else is installed."""

from benchmarks import peers
from benchmarks.harness import bench_op
from llmsys.ops.swiglu import OP, cases

BENCH = bench_op(OP, cases, peers.SWIGLU)


def test_swiglu(benchmark, contestant):
    benchmark(contestant)
