import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import llmsys
from llmsys.train.checkpoint import latest_checkpoint, random_state, read_state, set_random_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit(make_trainer, tmp_path, dtype):
    whole = make_trainer(dtype=dtype, accumulation=2)
    expected = [(r.loss, r.grad_norm, r.lr) for r in (whole.step() for _ in range(10))]
    first = make_trainer(dtype=dtype, accumulation=2)
    got = [first.step() for _ in range(5)]
    torch.rand(3)
    noise = (first.save(tmp_path), torch.rand(4))[1]
    second = make_trainer(dtype=dtype, accumulation=2)
    second.restore(latest_checkpoint(tmp_path))
    assert torch.equal(torch.rand(4), noise)
    got += [second.step() for _ in range(5)]
    assert [(r.loss, r.grad_norm, r.lr) for r in got] == expected
    for name, weight in whole.model.named_parameters():
        assert torch.equal(second.model.get_parameter(name), weight), name


def test_the_last_ones_are_kept(make_trainer, tmp_path):
    trainer = make_trainer(keep_checkpoints=2)
    (tmp_path / ".partial-step-00000009").mkdir()  # a kill in the middle of an earlier save left it
    for _ in range(4):
        trainer.step()
        trainer.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused(make_trainer, tmp_path, name, damage):
    trainer = make_trainer()
    path = trainer.save(tmp_path) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) * 2 // 3])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=f"load_checkpoint: {path.parent}"):
        trainer.restore(path.parent)


def test_tensors_of_another_shape_are_refused(make_trainer, tmp_path):
    """Also when the manifest was made to match."""
    from safetensors.torch import load_file, save_file

    from llmsys.train.checkpoint import _fingerprint

    trainer = make_trainer()
    trainer.step()
    path = trainer.save(tmp_path)
    tensors = load_file(path / "optimizer.safetensors")
    tensors["0.exp_avg"] = tensors["0.exp_avg"][:-1].clone()
    save_file(tensors, path / "optimizer.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["optimizer.safetensors"] = _fingerprint(path / "optimizer.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"optimizer tensor 0.exp_avg of shape \(299, 32\)"):
        trainer.restore(path)


def test_another_model_is_refused(make_trainer, tmp_path):
    import dataclasses

    trainer = make_trainer()
    path = trainer.save(tmp_path)
    other = make_trainer(model=dataclasses.replace(trainer.config.model, rope_theta=500.0))
    with pytest.raises(ValueError, match="rope_theta"):
        other.restore(path)


def saving_fails(trainer, folder, reason):
    """The second save fails and says why, and the first checkpoint is still good and alone."""
    with pytest.raises(RuntimeError, match=f"save_checkpoint.*{reason}.*the last good one is .*step-00000001"):
        trainer.save(folder)
    assert os.listdir(folder) == ["step-00000001"]
    assert read_state(latest_checkpoint(folder))["step"] == 1


def test_a_full_disk_leaves_the_last_good_one(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.step()
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        folder = disk / "checkpoints"
        trainer.save(folder)
        trainer.step()
        saving_fails(trainer, folder, "No space left on device")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_too_large_leaves_the_last_good_one(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.step()
    trainer.save(tmp_path)
    trainer.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        saving_fails(trainer, tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    import llmsys.train.checkpoint as checkpoint

    torch.set_num_threads(1)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()

    def die_at(event):
        left = [event]
        def counted(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        os.fsync, os.rename = counted(os.fsync), counted(os.rename)
        for name in ("save_weights", "save_file", "_write_json", "_fingerprint"):
            setattr(checkpoint, name, counted(getattr(checkpoint, name)))

    for event in range(1, 16):
        folder = Path(sys.argv[1]) / str(event)
        checkpoint.save_checkpoint(folder, 1, model, optimizer, {})
        child = os.fork()
        if child == 0:
            die_at(event)
            checkpoint.save_checkpoint(folder, 2, model, optimizer, {})
            os._exit(0)
        print(event, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_kill_at_any_moment_leaves_a_good_one(tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(llmsys.__file__).parents[1])}
    done = subprocess.run(script, check=True, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    codes = dict(map(int, line.split()) for line in lines)
    assert set(codes.values()) == {0, -signal.SIGKILL}  # so the kills reach to the end of a save
    steps = [read_state(latest_checkpoint(tmp_path / str(event)))["step"] for event in codes]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
    assert steps.count(1) > 8


def test_random_state_round_trip():
    state = random_state()
    first = torch.rand(5)
    set_random_state(json.loads(json.dumps(state)))
    assert torch.equal(torch.rand(5), first)
