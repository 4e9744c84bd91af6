"""The figure and the record of the layouts' loss curves, from logs made up here."""

import pytest

from benchmarks.train.layouts import ALONE, content_of, plot, train


def rows(*losses):
    return [{"step": i + 1.0, "loss": loss, "validation_loss": 2.0, "dp_bytes": 8.0} for i, loss in enumerate(losses)]


def test_record_and_figure(tmp_path):
    content = content_of({ALONE: rows(3.0, 2.0), "dp4": rows(3.0, 2.25)}, ["layouts"])
    assert content["losses"]["dp4"] == [3.0, 2.25]
    assert content["largest_distance"] == {ALONE: 0.0, "dp4": 0.25}
    assert content["bytes_per_step"]["dp4"] == {"dp_bytes": 8}
    plot(content["losses"], tmp_path / "layouts.png")
    assert (tmp_path / "layouts.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="unknown key stepz"):
        train(["stepz=1"], 1, tmp_path / "run")
