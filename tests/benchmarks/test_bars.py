"""Bars are judged on the right rows."""

import pytest

from benchmarks.bars import Bar, judge
from benchmarks.contest import Case
from llmsys.perf import report
from llmsys.perf.cli import Checkout

CASE = Case("ready", "forward", (4096, 4096))


def row(impl="cpu", case=CASE, **values):
    defaults = {"median_s": 2e-3, "quartiles_s": (1e-3, 3e-3), "ceiling_percent": 81.0}
    where = {"mode": case.mode, "direction": case.direction, "shape": case.shape, "dtype": case.dtype}
    return report.Row(op="rms_norm", impl=impl, caches=case.caches, **where, **{**defaults, **values})


def bar(measure, target, than="", impl="", needs=""):
    return Bar("rms_norm", CASE, measure, target, than, impl, needs)


@pytest.mark.parametrize(
    "asked, figure, met",
    [
        (bar("percent", 80), 81.0, True),
        (bar("percent", 82), 81.0, False),
        (bar("times", 4, "eager"), 5.0, True),
        (bar("times", 6, "eager"), 5.0, False),
        (bar("times", 0.5, "cpu", "cpu[avx2]"), 0.25, False),
        (bar("extra_us", 3, "close"), 2.0, True),
        (bar("extra_us", 1, "close"), 2.0, False),
    ],
)
def test_judge(asked, figure, met):
    rows = [
        row("triton", median_s=None, quartiles_s=None, ceiling_percent=None, why_not="no GPU"),
        row("cpu", peers={"eager": 10e-3, "close": 1.998e-3}),
        row("cpu[avx2]", median_s=8e-3),
        row("cpu", Case("ready", "forward", (1, 1)), ceiling_percent=1.0),
    ]
    verdict = judge(asked, rows)
    assert verdict.figure == pytest.approx(figure) and verdict.met is met


@pytest.mark.parametrize(
    "asked, reason",
    [
        (bar("times", 1, "liger"), "liger: not installed"),
        (bar("times", 0.5, "cpu", "cpu[avx2]", "AVX-512"), "needs AVX-512"),
        (Bar("rms_norm", Case("ready", "forward", (1, 1)), "percent", 80), "not measured"),
        (Bar("swiglu", CASE, "percent", 80), "not measured"),
    ],
)
def test_what_cannot_be_judged_says_why(asked, reason):
    verdict = judge(asked, [row(peers={"liger": None}, peers_why_not={"liger": "not installed"})])
    assert verdict.figure is None and verdict.met is None and verdict.why_not == reason


def test_red_is_not_a_figure():
    red = row(median_s=None, quartiles_s=None, ceiling_percent=None, correct=False, why_not="wrong: error 1")
    verdict = judge(bar("percent", 80), [red])
    assert verdict.met is None and verdict.why_not == "cpu: wrong: error 1"


@pytest.mark.parametrize("name", Checkout().ops())
def test_every_bar_is_of_its_own_benchmark(name):
    bench = Checkout().bench(name)
    assert {bar.op for bar in bench.bars} <= {bench.op} == {name}
