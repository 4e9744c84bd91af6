"""`llmsys.swiglu` against PyTorch and whatever else is installed."""

from llmsys.ops.swiglu import OP, cases

from benchmarks import peers
from benchmarks.harness import bench_op

BENCH = bench_op(OP, cases, peers.SWIGLU)


def test_swiglu(benchmark, contestant):
    benchmark(contestant)
