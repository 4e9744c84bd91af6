"""`llmsys train` under torchrun: what a lost rank means, and that the job goes on from its last checkpoint."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import llmsys as package
from benchmarks.parallel.hosts import Hosts, why_not
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
SETTINGS = (f"steps={STEPS}", f"checkpoint_every={EVERY}", "parallel.timeout_s=5", "parallel.connect_timeout_s=200")
DP = ("parallel.dp=2", "parallel.zero=2")
# torchrun, where it is new enough, kills a stopped rank after 5 s; it gives it 30.
ENVIRONMENT = {
    "PYTHONPATH": str(Path(package.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "PET_SHUTDOWN_TIMEOUT": "5",
}
# Fault → what does it, the ranks that say so, and the layout that it strikes.
FAULTS = {
    "killed rank": (lambda hosts: hosts.signal_rank(3, signal.SIGKILL), {0, 1, 2}, ("parallel.pp=2", "parallel.tp=2")),
    "stopped rank": (
        lambda hosts: hosts.signal_rank(3, signal.SIGSTOP),
        {0, 1, 2},
        ("parallel.pp=2", "parallel.dp=2", "parallel.zero=3", "parallel.schedule=zb_h1"),
    ),
    "link that is cut for a while": (
        lambda hosts: (hosts.cut(1), time.sleep(8), hosts.restore(1)),
        {0, 1, 2, 3},
        ("parallel.dp=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
    ),
}


@pytest.fixture
def folder(tmp_path):
    """Holds a text and a config of two layers."""
    config = CONFIG | {"model": CONFIG["model"] | {"num_layers": 2}}
    (tmp_path / "ducks.txt").write_text("".join(TEXT))
    (tmp_path / "ducks.json").write_text(json.dumps(config | {"data": {"sequence_length": 32, "paths": ["ducks.txt"]}}))
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


def without_a_fault(folder, tokens, layout):
    """The losses of a job of this layout."""
    config = load_config(str(folder / "ducks.json"), [*SETTINGS, *layout])
    p = config.parallel
    mesh = connect(pp=p.pp, dp=p.dp, tp=p.tp)
    splits = [
        batches(config, TokenFile(tokens), split, mesh.data.rank, mesh.data.size) for split in ("train", "validation")
    ]
    trainer = Trainer(config, engine(config, torch.float32, mesh), *splits)
    return [trainer.step().loss for _ in range(STEPS)]


def check(folder, text, layout, size):
    """One run, which went on from a checkpoint, and whose losses are bit for bit those of a job without a fault."""
    (own,) = folder.glob("runs/ducks-*")  # one folder, though its name has the time in it
    assert f"resumed from runs/{own.name}/checkpoints/step-" in text, text
    logged = rows(own / "log.csv")
    assert [int(row["step"]) for row in logged] == list(range(1, STEPS + 1))
    (tokens,) = folder.glob("runs/cache/*.tokens")
    losses = [float(row["loss"]) for row in logged]
    assert run(size, without_a_fault, folder, tokens, layout) == [losses] * size
    return logged


def said(text):
    """The ranks that name what they waited for."""
    named = r"llmsys\.parallel\.[\w ]+: rank (\d) on axis \w+ \(ranks [\d, ]+\), called at \S+:\d+, did not get through"
    return {int(rank) for rank in re.findall(named, text)}


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


def wait_until(condition, hopeless, text, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert not hopeless() and time.monotonic() < end, text()
        time.sleep(0.01)


def command(ranks, layout):
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--max-restarts=1"]
    return [*torchrun, "-m", "llmsys", "train", "ducks.json", *SETTINGS, *layout]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank's process in /proc")
def test_a_job_that_loses_a_rank_goes_on_from_its_last_checkpoint(folder):
    output = folder / "output.txt"
    with open(output, "w") as file:
        environment = os.environ | ENVIRONMENT
        process = subprocess.Popen(command(2, DP), cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        begun = partial(saved, folder)
        wait_until(begun, lambda: process.poll() is not None, output.read_text)
        os.kill(next(pid for pid in children(process.pid) if rank_of(pid) == 1), signal.SIGKILL)
        assert process.wait(timeout=240) == 0, output.read_text()
    finally:
        process.kill()
    assert said(output.read_text()) == {0}, output.read_text()
    logged = check(folder, output.read_text(), DP, 2)
    assert all(int(row["dp_bytes"]) > 0 and int(row["tp_bytes"]) == 0 for row in logged)


def saved(folder):
    return list(folder.glob("runs/ducks-*/checkpoints/step-*"))


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("fault", FAULTS)
def test_two_hosts_go_on_after_a_fault(fault, folder, monkeypatch):
    strike, survivors, layout = FAULTS[fault]
    monkeypatch.chdir(folder)
    outputs = [folder / f"host{index}.txt" for index in range(2)]

    def text():
        return "".join(path.read_text() for path in outputs)

    with Hosts(2) as hosts:
        for index, path in enumerate(outputs):
            with path.open("w") as output:
                hosts.run(index, command(2, layout), output=output, **ENVIRONMENT)
        wait_until(partial(saved, folder), lambda: "ChildFailedError" in text(), text)
        strike(hosts)
        statuses = hosts.wait(timeout_s=300, grace_s=60)
    assert statuses == [0, 0], text()
    assert said(text()) == survivors, text()
    check(folder, text(), layout, 4)


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
