import pytest
import torch

import llmsys
from benchmarks.bars import judge
from benchmarks.contest import Case
from benchmarks.ops import bench_linear_cross_entropy as bench

SHAPE = (70, 24, 300)


@pytest.mark.parametrize("peer", bench.PEERS, ids=lambda peer: peer.name)
def test_peer_computes_the_loss(peer):
    if reason := bench.why_not(peer, "cpu"):
        pytest.skip(f"{peer.name}: {reason}")
    args = bench.inputs(SHAPE, torch.float32, "cpu")
    torch.testing.assert_close(peer.build()(*args), llmsys.linear_cross_entropy(*args))


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    right = llmsys.linear_cross_entropy
    monkeypatch.setattr(llmsys, "linear_cross_entropy", lambda x, weight, target: right(x * 1.05, weight, target))
    bench.fault_of.cache_clear()
    assert "dinput: error" in bench.fault_of(24, 300, "bfloat16", "cpu")
    bench.fault_of.cache_clear()
    monkeypatch.undo()
    assert bench.fault_of(24, 300, "bfloat16", "cpu") is None


def test_bars_have_their_figure():
    case = Case("public", "forward+backward", SHAPE)
    bar = bench.Bar(bench.NAME, case, "times", 0.833, bench.GEMMS)
    assert judge(bar, bench.BENCH.run([case], budget_s=0.1)).figure > 0
