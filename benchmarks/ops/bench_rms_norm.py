"""`llmsys.rms_norm` against PyTorch and whatever else is installed."""

import torch.nn.functional as F

from benchmarks import bars, peers
from benchmarks.harness import bench_op
from llmsys.ops.rms_norm import OP, cases

BARS = (
    bars.ready("rms_norm", "forward", 80),
    bars.ready("rms_norm", "backward", 65),
    *(
        bars.public("rms_norm", direction, shape, times, than)
        for shape in ((2048, 2048), (8192, 1024))
        for direction in bars.DIRECTIONS
        for times, than in ((4, "eager"), (1.4, "torch.compile"))
    ),
    *(bars.Bar("rms_norm", bars.warm(shape), "times", 1, "eager") for shape in bars.SMALL),
    *bars.half_on_avx2("rms_norm"),
)


def formula(x, weight, eps, weight_offset):
    return F.rms_norm(x, weight.shape, weight + weight_offset if weight_offset else weight, eps)


BENCH = bench_op(OP, cases, formula, peers.RMS_NORM, BARS)


def test_rms_norm(benchmark, contestant):
    benchmark(contestant)
