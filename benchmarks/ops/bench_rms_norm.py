"""`llmsys.rms_norm` against PyTorch and whatever else is installed."""

from benchmarks import peers
from benchmarks.harness import bench_op
from llmsys.ops.rms_norm import OP, cases

BENCH = bench_op(OP, cases, peers.RMS_NORM)


def test_rms_norm(benchmark, contestant):
    benchmark(contestant)
