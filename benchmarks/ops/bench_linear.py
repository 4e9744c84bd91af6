"""`llmsys.linear` against PyTorch."""

from benchmarks import peers
from benchmarks.harness import bench_op
from llmsys.ops.linear import OP, cases

BENCH = bench_op(OP, cases, peers.LINEAR)


def test_linear(benchmark, contestant):
    benchmark(contestant)
