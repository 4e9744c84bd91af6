"""`llmsys.l2_norm` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.l2_norm import OP, cases

BARS = (
    bars.ready("l2_norm", "forward", 80),
    bars.ready("l2_norm", "backward", 65),
    *(bars.public("l2_norm", direction, (2048, 2048), 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(x, eps):
    return F.normalize(x, dim=-1, eps=eps)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_l2_norm(benchmark, contestant):
    benchmark(contestant)
