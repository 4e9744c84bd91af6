import csv
import io
import os
import signal

import pytest
from rich.console import Console

from llmsys.parallel import CollectiveError
from llmsys.train.checkpoint import latest_checkpoint, read_state
from llmsys.train.logs import Logs
from llmsys.train.loop import run


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def train(trainer, folder):
    output = io.StringIO()
    run(trainer, folder, gemm_rate=1e11, console=Console(file=output, width=200))
    return output.getvalue()


def test_the_loss_falls_and_is_logged(make_trainer, tmp_path):
    trainer = make_trainer(steps=40, validate_every=20, checkpoint_every=15)
    before = trainer.validate()
    output = train(trainer, tmp_path)
    logged = rows(tmp_path)
    assert [int(row["step"]) for row in logged] == list(range(1, 41))
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"]) - 1
    assert [int(row["step"]) for row in logged if row["validation_loss"]] == [20, 40]
    assert float(logged[-1]["validation_loss"]) == trainer.validate() < before - 1
    flops = trainer.config.model.flops_per_token(trainer.config.data.sequence_length)
    assert float(logged[7]["mfu"]) == pytest.approx(float(logged[7]["tokens_per_s"]) * flops / 1e11)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000030", "step-00000040"]
    assert "40/40" in output
    assert "tokens/s" in output
    assert "MFU" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_to_go_on_from(make_trainer, tmp_path, number):
    trainer, step = make_trainer(), make_trainer().step
    expected = [step().loss for _ in range(10)]
    step = trainer.step

    def interrupted_step():
        record = step()
        if record.step == 4:
            os.kill(os.getpid(), number)
        return record

    trainer.step = interrupted_step
    usual = signal.getsignal(number)
    output = train(trainer, tmp_path)
    assert signal.getsignal(number) is usual
    assert f"Stopped after step 4 of 10; go on with: llmsys train --resume {tmp_path}" in output
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert read_state(checkpoint)["step"] == 4
    second = make_trainer()
    second.restore(checkpoint)
    train(second, tmp_path)
    assert [float(row["loss"]) for row in rows(tmp_path)] == expected


def test_a_rank_that_lost_another_lives_to_say_so(make_trainer, tmp_path, monkeypatch):
    """torchrun sends SIGTERM as soon as it finds that a rank is lost."""
    usual = signal.getsignal(signal.SIGTERM)

    def lost(*_):
        raise CollectiveError("llmsys.parallel.all_reduce: rank 0 on axis dp")

    trainer = make_trainer()
    trainer.step = lost
    monkeypatch.setattr(Logs, "close", lambda logs: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(CollectiveError):
            train(trainer, tmp_path)
        assert signal.getsignal(signal.SIGTERM) is usual  # the second acts as usual
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_steps_that_are_done_again_are_logged_once(make_trainer, tmp_path):
    trainer = make_trainer()
    for _ in range(3):
        trainer.step()
    checkpoint = trainer.save(tmp_path / "checkpoints")
    train(trainer, tmp_path)  # logs steps 4 to 10, as a run that was killed after its checkpoint of step 3
    second = make_trainer()
    second.restore(checkpoint)
    (tmp_path / "checkpoints" / "step-00000010").rename(tmp_path / "lost")
    train(second, tmp_path)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(4, 11))


def test_tensorboard_gets_the_same_figures(make_trainer, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_trainer(tensorboard=True, steps=4), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("loss")]
    assert [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path)] == losses
    assert {"mfu", "tokens_per_s", "validation_loss", "lr"} <= set(events.Tags()["scalars"])
