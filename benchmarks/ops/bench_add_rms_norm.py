"""`llmsys.add_rms_norm` against PyTorch and whatever else is installed."""

from benchmarks import peers
from benchmarks.harness import bench_op
from benchmarks.ops import bench_rms_norm
from llmsys.ops.add_rms_norm import OP, cases


def formula(x, residual, weight, eps, weight_offset):
    total = x + residual
    return bench_rms_norm.formula(total, weight, eps, weight_offset), total


BENCH = bench_op(OP, cases, formula, peers.ADD_RMS_NORM)


def test_add_rms_norm(benchmark, contestant):
    benchmark(contestant)
