"""`llmsys.linear` against PyTorch.

The bars are float32's, packing included: at least PyTorch's speed, whose GEMM is near the machine's peak for many rows.
"""

import torch.nn.functional as F

from benchmarks.bars import Bar
from benchmarks.contest import Case
from benchmarks.harness import bench_op
from llmsys.ops.linear import OP, cases, reference

BARS = tuple(
    Bar("linear", Case("public", direction, (rows, 4096), "float32"), "times", 0.95, "eager")
    for rows in (66, 132, 510, 2046)
    for direction in ("forward", "forward+backward")
)


def formula(x, weight, bias, activation, residual):
    y = reference.activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


BENCH = bench_op(OP, cases, formula, bars=BARS, gradients_out=1)


def test_linear(benchmark, contestant):
    benchmark(contestant)
