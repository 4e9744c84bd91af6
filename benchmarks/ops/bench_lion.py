"""Lion over 33.6 million parameters."""

import llmsys.optim
from benchmarks.optimizers import bench_optimizer
from llmsys.ops.lion import OP, cases

BENCH = bench_optimizer(OP, cases, llmsys.optim.Lion, {"lr": 1e-4, "weight_decay": 0.1})


def test_lion(benchmark, contestant):
    benchmark(contestant)
