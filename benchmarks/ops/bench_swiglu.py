"""`llmsys.swiglu` against PyTorch and whatever else is installed."""

import torch.nn.functional as F

from benchmarks import bars, peers
from benchmarks.harness import bench_op
from llmsys.ops.swiglu import OP, cases

BARS = (
    bars.ready("swiglu", "forward", 80),
    bars.ready("swiglu", "backward", 70),
    *(bars.public("swiglu", direction, (2048, 2048), 1.4, "torch.compile") for direction in bars.DIRECTIONS),
    *(bars.Bar("swiglu", bars.warm(shape), "extra_us", 3, "eager") for shape in bars.SMALL),
    *bars.half_on_avx2("swiglu"),
)


def formula(gate, up):
    return F.silu(gate) * up


BENCH = bench_op(OP, cases, formula, peers.SWIGLU, BARS)


def test_swiglu(benchmark, contestant):
    benchmark(contestant)
