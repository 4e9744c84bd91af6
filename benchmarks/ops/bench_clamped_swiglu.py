"""`llmsys.clamped_swiglu` against PyTorch."""

import torch

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.clamped_swiglu import OP, cases

BARS = bars.pointwise("clamped_swiglu")


def formula(gate, up, limit, alpha):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_clamped_swiglu(benchmark, contestant):
    benchmark(contestant)
