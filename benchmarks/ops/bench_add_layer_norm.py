"""`llmsys.add_layer_norm` against PyTorch."""

from benchmarks import bars
from benchmarks.harness import bench_op
from benchmarks.ops import bench_layer_norm
from llmsys.ops.add_layer_norm import OP, cases

BARS = (
    bars.ready("add_layer_norm", "forward", 80),
    bars.ready("add_layer_norm", "backward", 65),
    *(bars.public("add_layer_norm", direction, (2048, 2048), 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(x, residual, weight, bias, eps):
    total = x + residual
    return bench_layer_norm.formula(total, weight, bias, eps), total


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_add_layer_norm(benchmark, contestant):
    benchmark(contestant)
