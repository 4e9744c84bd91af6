"""`llmsys.layer_norm` against PyTorch."""

import torch.nn.functional as F

from benchmarks import bars
from benchmarks.harness import bench_op
from llmsys.ops.layer_norm import OP, cases

BARS = (
    bars.ready("layer_norm", "forward", 80),
    bars.ready("layer_norm", "backward", 65),
    *(bars.public("layer_norm", direction, (2048, 2048), 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_layer_norm(benchmark, contestant):
    benchmark(contestant)
