"""`llmsys.embedding` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.embedding import OP, cases

BARS = (
    bars.ready("embedding", "forward", 80),
    bars.ready("embedding", "backward", 65),
    *(bars.public("embedding", direction, (2048, 2048), 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(weight, ids, padding_idx):
    return F.embedding(ids, weight, padding_idx)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_embedding(benchmark, contestant):
    benchmark(contestant)
