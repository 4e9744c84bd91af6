"""`llmsys.group_norm` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.group_norm import OP, cases

LARGE, SMALLER = cases.LARGE[:2]  # as many elements as 4096×4096 and 2048×2048
BARS = (
    bars.ready("group_norm", "forward", 80, LARGE),
    bars.ready("group_norm", "backward", 65, LARGE),
    *(bars.public("group_norm", direction, SMALLER, 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(x, num_groups, weight, bias, eps):
    return F.group_norm(x, num_groups, weight, bias, eps)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_group_norm(benchmark, contestant):
    benchmark(contestant)
