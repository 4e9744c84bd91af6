"""`llmsys train` under torchrun: what a lost rank means, and that the job goes on from its last checkpoint."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import llmsys as package
from llmsys.data import TokenFile
from llmsys.parallel import connect, disconnect
from llmsys.train.config_file import load_config
from llmsys.train.ranks import engine
from llmsys.train.run import batches
from llmsys.train.trainer import Trainer
from tests.parallel.ranks import run
from tests.parallel.test_connect import free_port

from .conftest import TEXT
from .test_command import CONFIG, llmsys  # noqa: F401 (a fixture)

STEPS, EVERY = 60, 20
WORDS = (f"steps={STEPS}", f"checkpoint_every={EVERY}", "parallel.dp=2", "parallel.zero=2")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ducks.txt").write_text("".join(TEXT))
    (tmp_path / "ducks.json").write_text(json.dumps(CONFIG | {"data": {"sequence_length": 32, "paths": ["ducks.txt"]}}))
    return tmp_path


@pytest.fixture
def one_rank_job(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    yield
    disconnect()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_a_fault(folder, tokens):
    """The losses of the job's layout."""
    config = load_config(str(folder / "ducks.json"), WORDS)
    mesh = connect(dp=2)
    splits = [batches(config, TokenFile(tokens), split, mesh.data.rank, 2) for split in ("train", "validation")]
    trainer = Trainer(config, engine(config, torch.float32, mesh), *splits)
    return [trainer.step().loss for _ in range(STEPS)]


def rank_of(pid):
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(each[5:]) for each in variables if each.startswith(b"RANK=")), None)


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_until(condition, process, output, seconds=240):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.01)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank's process in /proc")
def test_a_job_that_loses_a_rank_goes_on_from_its_last_checkpoint(folder):
    output = folder / "output.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "llmsys", "train", "ducks.json", *WORDS]
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: list(folder.glob("runs/ducks-*/checkpoints/step-*")), process, output)
        victim = next(pid for pid in children(process.pid) if rank_of(pid) == 1)
        os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=240) == 0, output.read_text()
    finally:
        process.kill()
    (own,) = folder.glob("runs/ducks-*")  # one folder, though it has a name of the time
    text = output.read_text()
    assert f"resumed from runs/{own.name}/checkpoints/step-" in text
    assert "llmsys.parallel." in text and "rank 0 on axis" in text  # the other rank says what it waited for
    logged = rows(own / "log.csv")
    assert [int(row["step"]) for row in logged] == list(range(1, STEPS + 1))
    assert all(int(row["dp_bytes"]) > 0 and int(row["tp_bytes"]) == 0 for row in logged)
    (tokens,) = folder.glob("runs/cache/*.tokens")
    expected, again = run(2, without_a_fault, folder, tokens)
    assert [float(row["loss"]) for row in logged] == expected == again  # bit for bit


def test_a_job_of_one_rank(llmsys, folder, one_rank_job):  # noqa: F811
    code, output = llmsys("train", "ducks.json", "output=runs/a")
    assert code == 0
    for part in ("1 ranks", "20/20", "the model writes", "The "):
        assert part in output
    assert rows(folder / "runs/a/log.csv")[-1]["validation_loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tp=2"], r"tp 2 is 2 ranks and the job has 1, expected sizes whose product is 1"),
        (["--compare"], "--compare in a job of ranks, expected one process"),
        (["output=runs/a"], "holds a run already"),
    ],
)
def test_a_job_that_cannot_be(llmsys, folder, one_rank_job, words, message):  # noqa: F811
    (folder / "runs/a").mkdir(parents=True)
    (folder / "runs/a/config.json").write_text("{}")
    code, _ = llmsys("train", "ducks.json", *words)
    assert message in code
