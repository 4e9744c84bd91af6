"""`llmsys bench ops` from end to end, on the smallest case, and what it says when it cannot."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import contest, harness, peers
from llmsys.perf import ceilings, cli, report

SMALLEST = ["ops", "--op", "swiglu", "--shape", "16x64", "--budget", "0.01"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two sets of buffers, no compilation, no measured ceiling."""
    for module in (harness, contest):
        monkeypatch.setattr(module, "sets_for_cold_caches", lambda set_bytes, device: 2)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    monkeypatch.setattr(ceilings, "bandwidth", lambda device="cpu": ceilings.Bandwidth(3e9, 2e9, 1e9, {}))


def run(*arguments):
    app = typer.Typer()
    app.command()(cli.bench)
    return CliRunner().invoke(app, arguments)


def test_rows_and_record(tmp_path):
    path = tmp_path / "out" / "rows.json"
    result = run(*SMALLEST, "--dtype", "float32", "--json", str(path))
    assert result.exit_code == 0, result.output
    content, rows = report.read_record(path)
    assert {(row.op, row.shape, row.dtype) for row in rows} == {("swiglu", (16, 64), "float32")}
    assert any(row.impl == "cpu" and row.median_s > 0 and row.correct for row in rows)
    assert {"ready", "public"} == {row.mode for row in rows}
    assert content["suite"] == "ops" and content["bars"] == []


def test_red_is_exit_code_1_and_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "fault_of", lambda op, cases, impl, **case: "y: error 1, allowed 0")
    path = tmp_path / "rows.json"
    result = run(*SMALLEST, "--json", str(path))
    assert result.exit_code == 1
    rows = [row for row in json.loads(path.read_text())["rows"] if row["impl"] == "cpu"]
    assert rows and all(row["median_s"] is None and row["correct"] is False for row in rows)
    assert "wrong: y: error 1" in result.output


def test_record_goes_to_the_machines_folder():
    content = {**report.environment(), "date": "2026-01-02T03:04:05+00:00", "suite": "bars"}
    path = report.record_path(content)
    folder = report.CHECKOUT / "benchmarks" / "records" / report.machine_name(content)
    assert path == folder / "2026-01-02-bars.json"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["opps"], "suite 'opps', expected one of ops"),
        (["ops", "--op", "nope"], "--op nope, expected one of"),
        (["ops", "--shape", "4x-1"], "--shape 4x-1, expected positive sizes"),
        (["ops", "--dtype", "int7"], "--dtype int7, expected one of float32, bfloat16, float16"),
    ],
)
def test_bad_options(arguments, message):
    result = run(*arguments)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith("llmsys.perf.bench: " + message)


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CHECKOUT", tmp_path)
    result = run("ops")
    assert isinstance(result.exception, RuntimeError)
    assert "expected a source checkout; clone" in str(result.exception)
