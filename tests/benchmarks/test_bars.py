"""Bars are judged on the right rows, and README's table says what the record says."""

import pytest

from benchmarks import bars, readme
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


def test_readme_table(tmp_path):
    verdicts = [judge(bar("percent", 80), [row()]), judge(bar("times", 4, "eager"), [])]
    environment = {**report.environment(["llmsys", "bench", "ops"]), "commit": "0123456789abcdef", "dirty": True}
    content = report.record(
        environment,
        [row()],
        bandwidth_bytes_per_s={"copy": 21e9},
        bars=[bars.as_record(verdict) for verdict in verdicts],
    )
    report.write_record(tmp_path / "r.json", content)
    marked = "before\n<!-- bars: r.json -->\nold\n<!-- /bars -->\nafter\n"
    text = readme.rendered(marked, tmp_path)
    assert "| rms_norm ready forward 4096×4096 | ≥ 80 % of copy bandwidth | 81.00 | met |" in text
    assert "not measured" in text and "old" not in text
    assert "0123456789ab with uncommitted changes" in text and "21.0 GB/s" in text
    assert text.startswith("before\n<!-- bars: r.json -->") and text.endswith("<!-- /bars -->\nafter\n")
    assert readme.rendered(text, tmp_path) == text


def test_readme_check(tmp_path, monkeypatch, capsys):
    report.write_record(
        tmp_path / "r.json",
        report.record(
            report.environment(),
            [],
            bandwidth_bytes_per_s={"copy": 1e9},
            bars=[bars.as_record(judge(bar("percent", 80), [row()]))],
        ),
    )
    monkeypatch.setattr(readme, "CHECKOUT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- bars: r.json -->\n<!-- /bars -->\n")
    assert readme.main(["--check"]) == 1 and "run `python -m benchmarks.readme`" in capsys.readouterr().out
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0


def test_readme_without_marker_or_bars(tmp_path):
    with pytest.raises(ValueError, match="no marker"):
        readme.rendered("nothing here", tmp_path)
    report.write_record(tmp_path / "r.json", report.record(report.environment(), [row()], bars=[]))
    with pytest.raises(ValueError, match="has no bars"):
        readme.rendered("<!-- bars: r.json -->\n<!-- /bars -->\n", tmp_path)


def test_readme_says_where_each_op_last_ran(tmp_path):
    """The latest finding of each implementation counts, ops that agree share a row, and what is wrong shows."""

    def keep(machine, date, gpus, findings):
        keys = ("op", "implementation", "right")
        ops = [dict(zip(keys, finding, strict=True)) for finding in findings]
        content = {**report.environment(), "date": date, "commit": "abc", "dirty": False, "torch": "2.13"}
        content["machine"] = {**content["machine"], "cpu": f"{machine} CPU", "gpus": gpus}
        path = tmp_path / "benchmarks" / "records" / machine / f"{date}-doctor.json"
        report.write_record(path, report.record(content, [], suite="doctor", ops=ops))

    keep("old", "2026-01-01", [], [("silu", "cpu[avx2]", True), ("silu", "triton", True), ("lion", "cpu[avx2]", True)])
    keep("new", "2026-02-02", ["H9"], [("silu", "triton", True), ("silu", "cpu[avx2]", False), ("silu", "torch", True)])
    keep(
        "last", "2026-03-03", [], [("lion", "triton", None), ("relu2", "cpu[avx2]", True), ("lion", "cpu[avx2]", True)]
    )
    text = readme._status(tmp_path / "benchmarks" / "records")
    assert "| `silu` | – | WRONG on new CPU | – | – | H9 | old CPU | – | – |" in text
    assert "| `lion` `relu2` | – | last CPU | – | – | – | – | – | – |" in text
    for place, date in (("H9", "2026-02-02"), ("last CPU", "2026-03-03"), ("old CPU", "2026-01-01")):
        assert f"{place}: {date}, torch 2.13, abc" in text
