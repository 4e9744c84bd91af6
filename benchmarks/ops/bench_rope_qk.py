"""`llmsys.rope_qk` against PyTorch."""

from benchmarks import bars
from benchmarks.harness import bench_op
from benchmarks.ops.bench_rope import formula as rope
from llmsys.ops.rope_qk import OP, cases

SHAPE = cases.LARGE[0]
BARS = (
    bars.ready("rope_qk", "forward", 80, SHAPE),
    bars.ready("rope_qk", "backward", 65, SHAPE),
    *(bars.public("rope_qk", direction, SHAPE, 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(q, k, cos, sin, interleaved):
    return rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)


BENCH = bench_op(OP, cases, formula, bars=BARS)


def test_rope_qk(benchmark, contestant):
    benchmark(contestant)
