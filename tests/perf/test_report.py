import json
import subprocess

import pytest
from rich.console import Console

from llmsys import doctor as doctor_module
from llmsys.perf import report

ROW = report.Row(
    op="rms_norm", impl="cpu", mode="ready", direction="forward", shape=(16, 64), dtype="bfloat16", caches="cold",
    median_s=2e-6, quartiles_s=(1e-6, 3e-6), rounds=9, bytes=4096, flops=4096, ceiling_percent=50.0,
    peers={"eager": 5e-6, "apex": None}, peers_why_not={"apex": "not installed"}, correct=True,
)  # fmt: skip
RED = report.Row(
    op="rms_norm", impl="cpu[avx2]", mode="ready", direction="forward", shape=(16, 64), dtype="bfloat16", caches="cold",
    correct=False, why_not="wrong: y error 1.0, allowed 0.1",
)  # fmt: skip


def rendered(table):
    console = Console(width=300)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_record_round_trip(tmp_path):
    path = tmp_path / "machine" / "record.json"
    report.write_record(path, report.record(report.environment(["llmsys", "bench"]), [ROW, RED], suite="ops"))
    content, rows = report.read_record(path)
    assert rows == [ROW, RED]
    assert content["suite"] == "ops" and content["command"] == ["llmsys", "bench"]
    issue_fields = {"op", "impl", "direction", "shape", "dtype", "median_s", "quartiles_s", "bytes", "flops"}
    assert issue_fields | {"ceiling_percent", "peers"} <= set(content["rows"][0])


def test_environment_names_machine_and_commit(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    environment = report.environment()
    assert environment["thread_settings"]["OMP_WAIT_POLICY"] == "passive"
    assert environment["machine"]["threads"] >= 1 and environment["machine"]["cpu"]
    assert report.machine_name(environment).replace("-", "").isalnum()
    if (report.CHECKOUT / ".git").exists():
        head = ["git", "-C", str(report.CHECKOUT), "rev-parse", "HEAD"]
        assert environment["commit"] == subprocess.run(head, capture_output=True, text=True).stdout.strip()
        assert environment["dirty"] in (True, False)


def test_records_of_the_same_day_are_no_change(monkeypatch, tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)

    monkeypatch.setattr(report, "CHECKOUT", tmp_path)
    for name, value in {"AUTHOR": "a", "COMMITTER": "a"}.items():
        monkeypatch.setenv(f"GIT_{name}_NAME", value)
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    git("init", "-q")
    (tmp_path / "code").write_text("1")
    git("add", "code")
    git("commit", "-qm", "code")
    report.write_record(tmp_path / "benchmarks" / "records" / "m" / "r.json", report.record(report.environment(), []))
    assert report.environment()["dirty"] is False
    (tmp_path / "code").write_text("2")
    assert report.environment()["dirty"] is True


def test_outside_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "CHECKOUT", tmp_path)
    environment = report.environment()
    assert environment["commit"] is None and environment["dirty"] is None


def test_outside_a_checkout_nothing_is_recorded(monkeypatch, tmp_path):
    """And that is said before minutes of work."""
    report.check_checkout()
    monkeypatch.setattr(report, "CHECKOUT", tmp_path)
    monkeypatch.setattr(doctor_module, "examine", lambda: pytest.fail("examined"))
    with pytest.raises(RuntimeError, match="has no benchmarks/records, expected a source checkout"):
        doctor_module.doctor(record=True)


@pytest.mark.parametrize(
    "text, message", [("{", "is not JSON"), ('{"format": 99}', "format 99"), ("[]", "format None")]
)
def test_foreign_record(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.read_record(path)


def test_table_shows_ratios_reasons_and_no_number_for_red():
    text = rendered(report.rows_table([ROW, RED]))
    assert "2.50" in text and "not installed" in text and "wrong: y error" in text
    red_line = next(line for line in text.splitlines() if "cpu[avx2]" in line)
    assert "µs" not in red_line and "0.0" not in red_line


def test_sizes_in_words():
    assert report.sizes((8192, 1024)) == "8192×1024"
    assert report.sizes((1 << 22, 1 << 11) * 8) == "33.6 M in 16 tensors"


def test_record_is_plain_json(tmp_path):
    path = tmp_path / "record.json"
    report.write_record(path, report.record(report.environment(), [ROW]))
    assert json.loads(path.read_text())["rows"][0]["shape"] == [16, 64]
