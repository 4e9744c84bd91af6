import os
import subprocess
import sys
from pathlib import Path

import llmsys as library

from .conftest import TEXT

SETTINGS = (
    "model.vocab_size=300 model.dim=32 model.num_layers=1 model.num_heads=2 model.num_kv_heads=1 model.head_dim=16 "
    "model.hidden_dim=48 data.sequence_length=32 optimizer.warmup_steps=2 steps=20 precision=float32 "
    "generated_tokens=8 validation_batches=2 tensorboard=false"
).split()


def llmsys(*words, folder):
    command = [sys.executable, "-c", "from llmsys.cli import main; main()", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(library.__file__).parents[1])}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_train_then_resume(tmp_path):
    (tmp_path / "ducks.txt").write_text("".join(TEXT))
    first = llmsys("train", "--data", "ducks.txt", "output=runs/a", *SETTINGS, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    for part in ("ducks.txt", "float32 (as configured)", "GFLOP/s", "20/20", "the model writes", "The "):
        assert part in first.stdout
    again = llmsys("train", "output=runs/a", *SETTINGS, folder=tmp_path)
    assert again.returncode == 1
    assert again.stderr == (
        "llmsys.train: output=runs/a holds a run already, expected a new folder; go on with it by --resume runs/a\n"
    )
    longer = llmsys("train", "--resume", "runs/a", "steps=24", folder=tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert "resumed from runs/a/checkpoints/step-00000020" in longer.stdout
    assert "24/24" in longer.stdout


def test_a_mistake_is_one_line(tmp_path):
    result = llmsys("train", "stepz=5", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("llmsys.train.config: unknown key stepz in the command line, expected one of")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
