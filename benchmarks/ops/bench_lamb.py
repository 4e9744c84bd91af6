"""LAMB over 33.6 million parameters, against Apex."""

import llmsys.optim
from benchmarks import peers
from benchmarks.optimizers import bench_optimizer
from llmsys.ops.lamb import OP, cases

BENCH = bench_optimizer(
    OP, cases, llmsys.optim.Lamb, {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}, peers.LAMB
)


def test_lamb(benchmark, contestant):
    benchmark(contestant)
