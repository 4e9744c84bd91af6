"""`llmsys bench train` on a tiny model: it measures what it says, and times nothing that is wrong."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks.bars import judge
from benchmarks.contest import Case
from benchmarks.train import whole_step

TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2}
CASE = Case("public", "step", (2, 16), "bfloat16")


class Here:
    """A worker in this process."""

    def __init__(self, name, commands, *arguments):
        self.commands = commands("eager" if name == "torch.compile" else name, *arguments[1:])

    def ask(self, name):
        return self.commands[name]()

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(whole_step, "Worker", Here)


def test_rows_bars_and_tables(here):
    (result,) = results = whole_step.run([CASE], rounds=2, **TINY)
    assert [row.impl for row in result.rows] == list(whole_step.OURS)
    for row in result.rows:
        assert row.correct and row.median_s > 0 and row.peak_bytes is not None
        assert set(row.peers) == set(row.peers_peak_bytes) == set(whole_step.PEERS)
    assert set(result.seconds) == {*whole_step.KINDS, "Python"}
    for kind in ("matrix products", "head and loss", "attention", "optimizer and clipping"):
        assert result.seconds[kind] > 0, kind
    output = io.StringIO()
    Console(file=output, width=200).print(whole_step.table(results), whole_step.where_table(results))
    assert "torch.compile" in output.getvalue() and "memory-bound" in output.getvalue()


def test_what_is_wrong_gets_no_time(here, monkeypatch):
    def break_it(model):
        model.model.norm.variance_epsilon = 1.0

    monkeypatch.setattr(whole_step.llmsys, "accelerate", break_it)
    (result,) = whole_step.run([CASE], rounds=2, **TINY)
    for row in result.rows:
        assert row.correct is False and row.median_s is None and "wrong: d" in row.why_not


def test_every_bar_is_judged():
    row = whole_step._row(whole_step.CASES[0], "llmsys", median_s=1.0, peers={"eager": 1.5, "torch.compile": 1.1})
    row = replace(row, peak_bytes=50, peers_peak_bytes={"eager": 100, "torch.compile": 60})
    figures = [judge(bar, [row]).figure for bar in whole_step.BARS if bar.case == row_case(row) and not bar.impl]
    assert figures == [1.5, 1.1, 0.5]


def row_case(row):
    return Case(row.mode, row.direction, row.shape, row.dtype)


def test_tokens_and_weights_are_the_same_for_all():
    first, second = (whole_step.model_of(torch.bfloat16, **TINY) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
