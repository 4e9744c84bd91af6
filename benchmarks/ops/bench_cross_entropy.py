"""`llmsys.cross_entropy` of each row against PyTorch and whatever else is installed."""

import torch.nn.functional as F

import llmsys
from benchmarks import bars, peers
from benchmarks.harness import bench_op
from llmsys.ops.cross_entropy import OP, cases

SHAPE = (4096, 32000)
BARS = (
    bars.ready("cross_entropy", "forward", 80, SHAPE),
    bars.ready("cross_entropy", "backward", 65, SHAPE),
    *(bars.public("cross_entropy", direction, SHAPE, 1.3, "torch.compile") for direction in bars.DIRECTIONS),
)


def formula(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap):
    return F.cross_entropy(
        logits.float(), target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )


def of_each_row(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap):
    return llmsys.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )


BENCH = bench_op(OP, cases, formula, peers.CROSS_ENTROPY, BARS, of_each_row)


def test_cross_entropy(benchmark, contestant):
    benchmark(contestant)
