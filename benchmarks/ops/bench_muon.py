"""Muon over eight matrices of 1024 × 1024, against PyTorch's."""

import llmsys.optim
from benchmarks import peers
from benchmarks.optimizers import bench_optimizer
from llmsys.ops.muon import OP, cases

BENCH = bench_optimizer(OP, cases, llmsys.optim.Muon, {"lr": 0.02}, peers.MUON)


def test_muon(benchmark, contestant):
    benchmark(contestant)
