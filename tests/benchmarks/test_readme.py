"""The README says what records say."""

import pytest

from benchmarks import bars, readme
from benchmarks.bars import judge
from llmsys.perf import report
from tests.benchmarks.test_bars import bar, row


def test_bars(tmp_path):
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


def test_check(tmp_path, monkeypatch, capsys):
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


def test_no_marker_or_no_bars(tmp_path):
    with pytest.raises(ValueError, match="no marker"):
        readme.rendered("nothing here", tmp_path)
    report.write_record(tmp_path / "r.json", report.record(report.environment(), [row()], bars=[]))
    with pytest.raises(ValueError, match="has no bars"):
        readme.rendered("<!-- bars: r.json -->\n<!-- /bars -->\n", tmp_path)
    with pytest.raises(ValueError, match="marker 'bar', expected one of bars, "):
        readme.rendered("<!-- bar: r.json -->\n<!-- /bar -->\n", tmp_path)


def test_layouts(tmp_path):
    apart = {"alone": 0.0, "other sums": 1e-6, "dp2": 2.5e-6, "tp2": 1.5e-6}
    content = report.record(report.environment(["x"]), [], largest_distance=apart, losses={"alone": [1.0] * 7})
    report.write_record(tmp_path / "r.json", content)
    text = readme.rendered("<!-- layouts: r.json -->\n<!-- /layouts -->\n", tmp_path)
    assert "2 layouts in float32" in text and "losses of 7 steps are at most 2.5e-06 (dp2) from" in text
    assert "takes them 1.0e-06 away" in text and "(r.png)" in text and "`x`" in text


def test_composition(tmp_path):
    layouts = [{"errors": {"losses": 1e-16, "weights": 3e-14}}, {"errors": {"losses": 2e-16, "weights": 1e-14}}]
    facts = {"layouts": layouts, "of": 1234, "strength": 3, "dimensions": {"a": [], "b": []}, "wrong": 0}
    report.write_record(tmp_path / "r.json", report.record(report.environment(), [], **facts, tolerance=1e-10))
    text = readme.rendered("<!-- composition: r.json -->\n<!-- /composition -->\n", tmp_path)
    assert "2 of 1,234 layouts, in which every 3 values of 2 choices" in text and "0 are further than 1e-10" in text
    assert "losses 2.0e-16, weights 3.0e-14" in text


def test_says_where_each_op_last_ran(tmp_path):
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
