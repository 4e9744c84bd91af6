"""`llmsys.rope` against PyTorch and whatever else is installed."""

from benchmarks import peers
from benchmarks.harness import bench_op
from llmsys.ops.rope import OP, cases

BENCH = bench_op(OP, cases, peers.ROPE)


def test_rope(benchmark, contestant):
    benchmark(contestant)
