"""The peers of attention compute what they are timed against, and what is wrong gets no time."""

from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import llmsys
from benchmarks.contest import Case
from benchmarks.ops import bench_attention as bench

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
SHAPE, PACKED = (2, 64, 64, 4, 2, 16, 16), (1, 64, 64, 4, 2, 16, 16)


def inputs(mode, direction="forward", dtype="float32"):
    return bench.Inputs(Case(mode, direction, PACKED if mode == "packed" else SHAPE, dtype), "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["public", "full", "window", "packed"])
def test_flex_attention_sees_what_ours_sees(mode, dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    given = inputs(mode, dtype=dtype)
    call = bench.flex(given.case, "cpu")
    assert bench.peer_fault(given, call) is None
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    torch.testing.assert_close(call(*given.leaves[0]), given.ours(mode, 0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("direction", ["forward", bench.TRAINS])
@pytest.mark.parametrize("mode", ["public", "full", "window", "packed"])
def test_a_wrong_peer_is_found_out(mode, direction):
    """One that sees other keys, or is a hundredth off; ours is not."""
    given = inputs(mode, direction)

    def packed(q, k, v, **options):
        bounds = bench.starts(64, "cpu")
        y = llmsys.attention(q[0], k[0], v[0], cu_seqlens_q=bounds, cu_seqlens_k=bounds, causal=True, **options)
        return y.unsqueeze(0)

    right = packed if mode == "packed" else partial(llmsys.attention, **bench.options(mode, 64))
    other = {"causal": mode == "full", "window": (16 if mode == "window" else -1, 0 if mode == "window" else -1)}
    assert bench.peer_fault(given, right) is None
    for wrong in (partial(llmsys.attention, **other), partial(right, scale=0.25 * 1.01)):
        assert "error" in bench.peer_fault(given, wrong)
        assert bench._entered(given, wrong).startswith("wrong: ")


@pytest.mark.skipif(TORCH < (2, 13), reason="older ones had a slow one, without torch.compile")
def test_flex_attention_has_no_backward_on_the_cpu():
    """The reason in the table is PyTorch's own; the day that it has one, this fails."""
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(x, x, x)
    given = inputs("public", bench.TRAINS)
    reasons = {name: why for name, _, why in bench._peers(given)}
    assert reasons[bench.FLEX] == "PyTorch has no backward of it on the CPU"
    assert reasons[bench.SDPA] is None and reasons[bench.FLASH] in ("not installed", "runs on cuda only")


def test_contest_has_every_peer():
    """By name, with a time or the reason why not."""
    contest = bench.contest_of(Case("public", bench.TRAINS, SHAPE, "float32"), "cpu")
    assert set(contest.peers) == {bench.GEMM, bench.SDPA, bench.FLASH, bench.FLEX}
    assert (
        callable(contest.peers[bench.SDPA]) and contest.peers[bench.FLEX] == "PyTorch has no backward of it on the CPU"
    )
    assert set(bench.contest_of(Case("full", bench.TRAINS, SHAPE), "cpu").peers) == {
        bench.GEMM,
        bench.CAUSAL,
        bench.FLEX,
    }
