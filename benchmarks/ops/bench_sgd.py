"""SGD with momentum over 33.6 million parameters, against PyTorch."""

import llmsys.optim
from benchmarks import peers
from benchmarks.optimizers import bench_optimizer
from llmsys.ops.sgd import OP, cases

BENCH = bench_optimizer(OP, cases, llmsys.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}, peers.SGD)


def test_sgd(benchmark, contestant):
    benchmark(contestant)
