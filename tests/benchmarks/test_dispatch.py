"""The raw binding that overhead is counted from does the op's work."""

import torch

import llmsys
from benchmarks.ops import bench_dispatch
from llmsys.ops.rms_norm import cases


def test_raw_call_computes_rms_norm():
    x, weight, *_ = cases.inputs((16, 64), torch.bfloat16)
    y = torch.full_like(x, float("nan"))
    bench_dispatch.raw_call(x, weight, y)(0)
    with llmsys.use(rms_norm="cpu"):
        assert torch.equal(y, llmsys.rms_norm(x, weight))
