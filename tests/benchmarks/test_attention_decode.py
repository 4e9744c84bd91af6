"""PyTorch's attention stands beside ours at every large shape, and computes the same."""

import torch

from benchmarks.contest import Case
from benchmarks.ops import bench_attention_decode as bench
from llmsys.ops.attention_decode import cases

SHAPE = (2, 1, 33, 8, 2, 16, 16)


def test_every_large_shape_is_raced_against_sdpa(monkeypatch):
    assert [case.shape for case in bench.BENCH.plan if case.mode == "public"] == list(cases.LARGE)
    monkeypatch.setattr(bench, "sets_for_cold_caches", lambda num_bytes, device: 2)
    (row,) = bench.BENCH.run([Case("public", "forward", SHAPE)], budget_s=0.01)
    assert row.correct and row.median_s and row.peers[bench.SDPA]


def test_sdpa_computes_the_op():
    args = cases.inputs(SHAPE, torch.float32, full=True)
    torch.testing.assert_close(bench.sdpa(args), bench.public(args))
