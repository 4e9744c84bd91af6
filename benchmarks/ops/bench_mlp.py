"""`llmsys.mlp` against PyTorch: matrix products all but alone."""

import torch.nn.functional as F

from benchmarks.harness import bench_op
from llmsys.ops.mlp import OP, cases


def formula(x, gate_weight, up_weight, down_weight, activation):
    assert activation == "silu"
    return F.linear(F.silu(F.linear(x, gate_weight)) * F.linear(x, up_weight), down_weight)


BENCH = bench_op(OP, cases, formula, gradients_out=1)


def test_mlp(benchmark, contestant):
    benchmark(contestant)
