"""`llmsys.softmax` against PyTorch."""

import torch

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.softmax import OP, cases

BARS = (
    bars.ready("softmax", "forward", 80),
    bars.ready("softmax", "backward", 65),
    *(bars.public("softmax", direction, (2048, 2048), 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(x):
    return torch.softmax(x, dim=-1)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_softmax(benchmark, contestant):
    benchmark(contestant)
