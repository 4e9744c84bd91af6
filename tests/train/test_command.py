import json
import sys

import pytest

from llmsys import cli
from llmsys.train import run

from .conftest import TEXT

CONFIG = {
    "model": {
        "vocab_size": 300, "dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "hidden_dim": 48,
    },
    "data": {"sequence_length": 32},
    "optimizer": {"warmup_steps": 2},
    "steps": 20, "precision": "float32", "generated_tokens": 8, "validation_batches": 2, "tensorboard": False,
}  # fmt: skip


@pytest.fixture
def llmsys(monkeypatch, capsys, tmp_path):
    """Runs the command line in `tmp_path`; returns its exit code, its message if it failed, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(run, "tune_allocator", lambda: None)  # it lasts as long as the process, which is the tests'

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["llmsys", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    return call


def test_train_then_resume(llmsys, tmp_path):
    (tmp_path / "ducks.txt").write_text("".join(TEXT))
    (tmp_path / "ducks.json").write_text(json.dumps(CONFIG))
    code, output = llmsys("train", "ducks.json", "--data", "ducks.txt", "output=runs/a")
    assert code == 0
    for part in ("ducks.txt", "float32 (as configured)", "GFLOP/s", "20/20", "the model writes", "The "):
        assert part in output
    assert json.loads((tmp_path / "runs/a/config.json").read_text())["precision"] == "float32"
    code, _ = llmsys("train", "ducks.json", "output=runs/a")
    assert code == (
        "llmsys.train: output=runs/a holds a run already, expected a new folder; go on with it by --resume runs/a"
    )
    code, output = llmsys("train", "--resume", "runs/a", "steps=24")
    assert code == 0
    assert "resumed from runs/a/checkpoints/step-00000020" in output
    assert "24/24" in output


def test_resume_latest_begins_and_then_goes_on(llmsys, tmp_path):
    (tmp_path / "ducks.txt").write_text("".join(TEXT))
    (tmp_path / "ducks.json").write_text(json.dumps(CONFIG))
    words = ("train", "ducks.json", "--data", "ducks.txt", "--resume-latest", "output=runs/a")
    code, output = llmsys(*words, "steps=4")
    assert code == 0
    assert "resumed" not in output
    code, output = llmsys(*words, "steps=6")
    assert code == 0
    assert "resumed from runs/a/checkpoints/step-00000004" in output
    code, _ = llmsys("train", "--resume-latest")
    assert code.startswith("llmsys.train: --resume-latest without output=")


def test_a_layout_of_several_ranks_needs_torchrun(llmsys, tmp_path):
    code, _ = llmsys("train", "parallel.pp=2", "parallel.tp=2")
    assert code == (
        "llmsys.train: parallel.pp · dp · tp is 4 ranks and this is one process, expected torchrun --nproc-per-node 4 "
        "-m llmsys train …"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_and_leaves_nothing(llmsys, tmp_path):
    code, output = llmsys("train", "stepz=5")
    assert code.startswith("llmsys.train.config: unknown key stepz in the command line, expected one of")
    assert "\n" not in code
    assert output == ""
    assert list(tmp_path.iterdir()) == []
