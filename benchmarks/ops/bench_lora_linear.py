"""`llmsys.lora_linear` against PyTorch."""

import torch.nn.functional as F

from benchmarks.harness import bench_op
from llmsys.ops.lora_linear import OP, cases


def formula(x, weight, lora_a, lora_b, bias, scale):
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, lora_a), lora_b)


BENCH = bench_op(OP, cases, formula, gradients_out=1)


def test_lora_linear(benchmark, contestant):
    benchmark(contestant)
