"""`python -m benchmarks.parallel.peers` on a tiny model: it measures what it says, and times nothing that is wrong."""

import io
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from benchmarks.bars import judge
from benchmarks.parallel import peers
from benchmarks.parallel.contenders import OUR_KERNELS, OURS, PAIRS, Pair, Setting, ddp
from llmsys.models.llama import LlamaConfig

TINY = Setting(
    config=LlamaConfig(
        vocab_size=64, dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48
    ),
    rows=4,
    length=8,
    micros=4,
)  # fmt: skip


def spoiled(factor, setting):
    """DistributedDataParallel whose gradients are not those of the loss."""
    training = ddp(setting)

    def gradients():
        for name, gradient, cut in training.gradients():
            yield name, gradient * factor, cut

    return replace(training, gradients=gradients)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.name in ("data parallel", "1F1B", "tensor")])
def test_rows_bars_and_table(pair):
    rows = peers.run([2], [pair], TINY, rounds=2)
    assert [row.impl for row in rows] == [OURS, pair.peer, OUR_KERNELS]
    for row in rows:
        assert row.correct and row.median_s > 0 and row.peak_bytes > 1 << 16, row.why_not
        assert set(row.peers) == set(row.peers_peak_bytes) == ({pair.peer} if row.impl != pair.peer else set())
    assert all(judge(bar, rows).figure > 0 for bar in peers.bars([2], [pair], TINY))
    output = io.StringIO()
    Console(file=output, width=200).print(peers.table(rows))
    assert pair.peer in output.getvalue()


def test_what_is_wrong_or_cannot_run_gets_no_number():
    pair = Pair(name="none", axis="dp", peer="spoiled", build=partial(spoiled, 1.001), options={"zero": 9})
    ours, peer, _ = rows = peers.run([2], [pair], TINY, rounds=2)
    assert ours.correct is None and "stage=9, expected" in ours.why_not
    assert peer.correct is False and "wrong: dembedding.weight: error" in peer.why_not
    assert not any(row.median_s or row.peak_bytes for row in rows)
    assert all(judge(bar, rows).figure is None for bar in peers.bars([2], [pair], TINY))
