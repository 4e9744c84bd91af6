"""`llmsys.dropout` against PyTorch, whose masks come from another generator: the same work, other elements."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.dropout import OP, cases

BARS = (
    bars.ready("dropout", "forward", 80),
    bars.ready("dropout", "backward", 65),
    *(bars.public("dropout", direction, (2048, 2048), 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(x, p, seed, offset):
    return F.dropout(x, p)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_dropout(benchmark, contestant):
    benchmark(contestant)
