import dataclasses
import json

import pytest

from llmsys.models import SIZES
from llmsys.train.config import TrainConfig
from llmsys.train.config_file import load_config


def test_demo_is_the_default():
    assert load_config("demo") == TrainConfig()


FILES = {
    "run.yaml": """
        name: from-file
        model: {size: 62M, num_layers: 2, max_sequence_length: 512}
        data: {paths: [a.txt, b.jsonl], sequence_length: 512}
        optimizer: {lr: 1e-3, weight_decay: 0}
        output: null
    """,
    "run.json": """{
        "name": "from-file",
        "model": {"size": "62M", "num_layers": 2, "max_sequence_length": 512},
        "data": {"paths": ["a.txt", "b.jsonl"], "sequence_length": 512},
        "optimizer": {"lr": 1e-3, "weight_decay": 0}
    }""",
    "run.toml": """
name = "from-file"
model = {size = "62M", num_layers = 2, max_sequence_length = 512}
data = {paths = ["a.txt", "b.jsonl"], sequence_length = 512}
optimizer = {lr = 1e-3, weight_decay = 0}
    """,
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_reads_the_same(tmp_path, name):
    if name.endswith(".toml"):
        pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11")
    (tmp_path / name).write_text(FILES[name])
    config = load_config(str(tmp_path / name))
    assert config.model == dataclasses.replace(SIZES["62M"], num_layers=2, max_sequence_length=512)
    assert config.data.paths == ("a.txt", "b.jsonl")
    assert (config.name, config.optimizer.lr, config.optimizer.weight_decay) == ("from-file", 1e-3, 0.0)
    assert config.optimizer.beta2 == TrainConfig().optimizer.beta2


def test_overrides_come_last(tmp_path):
    (tmp_path / "run.json").write_text('{"steps": 50}')
    words = ["steps=60", "optimizer.lr=1e-4", "data.paths=x.txt,y.txt", "tensorboard=false", "output=runs/here"]
    config = load_config(str(tmp_path / "run.json"), words)
    assert (config.name, config.steps, config.optimizer.lr) == ("run", 60, 1e-4)
    assert (config.data.paths, config.tensorboard, config.output) == (("x.txt", "y.txt"), False, "runs/here")
    assert load_config("demo", ["model.size=62M"]).model == SIZES["62M"]
    assert load_config("demo", ["model.num_heads=6", "model.num_kv_heads=3"]).model.num_kv_heads == 3  # judged together


def test_a_saved_config_loads_as_it_was(tmp_path):
    config = load_config("demo", ["steps=77", "data.paths=a,b", "optimizer.max_grad_norm=inf"])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["stepz=5"], ValueError, r"unknown key stepz in the command line, expected one of name, .*mean steps\?"),
        (["optimizer.lrr=1"], ValueError, r"unknown key optimizer\.lrr .*one of lr, .*did you mean optimizer\.lr\?"),
        (["model.sise=1"], ValueError, r"unknown key model\.sise .*did you mean model\.size\?"),
        (["steps.x=5"], TypeError, r"steps=\{'x': '5'\} in the command line, expected an integer"),
        (["optimizer=5"], TypeError, r"optimizer='5' .*expected a section"),
        (
            ["optimizer=5", "optimizer.lr=1"],
            ValueError,
            r"'optimizer\.lr=1' after optimizer=5, expected one of the two",
        ),
        (["optimizer.lr=1", "optimizer.lr=2"], ValueError, r"optimizer\.lr given twice"),
        (["steps"], ValueError, r"'steps', expected key=value"),
        (["steps=2.5"], TypeError, r"steps='2\.5' in the command line, expected an integer"),
        (["optimizer.lr=fast"], TypeError, r"optimizer\.lr='fast' .*expected a number"),
        (["tensorboard=yes"], TypeError, r"tensorboard='yes' .*expected true or false"),
        (["steps=0"], ValueError, r"steps=0, expected at least 1"),
        (["optimizer.lr=-1"], ValueError, r"optimizer\.lr=-1\.0, expected at least 0"),
        (["optimizer.lr=nan"], ValueError, r"optimizer\.lr=nan, expected at least 0"),
        (["optimizer.beta1=1"], ValueError, r"optimizer\.beta1=1\.0, expected less than 1"),
        (["optimizer.final_lr_ratio=2"], ValueError, r"optimizer\.final_lr_ratio=2\.0, expected at most 1"),
        (["optimizer.max_grad_norm=0"], ValueError, r"max_grad_norm=0\.0, expected more than 0"),
        (["optimizer.warmup_steps=500"], ValueError, r"warmup_steps=500, expected fewer than steps="),
        (["precision=fp8"], ValueError, r"precision='fp8', expected one of auto, float32, bfloat16"),
        (["model.size=3B"], ValueError, r"model\.size='3B' .*expected one of demo, 62M"),
        (["data.sequence_length=1024"], ValueError, r"data\.sequence_length=1024, expected at most .*=256"),
        (["model.num_kv_heads=3"], ValueError, r"num_kv_heads=3, expected a multiple"),
        (["device=gpu"], ValueError, r"device='gpu', expected cpu, cuda or cuda:<number>"),
        (["parallel.overlap_chunks=0"], ValueError, r"parallel\.overlap_chunks=0, expected at least 1"),
        (["parallel.tp=0"], ValueError, r"parallel\.tp=0, expected at least 1"),
        (["parallel.micro_batches=0"], ValueError, r"parallel\.micro_batches=0, expected at least 1"),
        (["parallel.timeout_s=0"], ValueError, r"parallel\.timeout_s=0\.0, expected seconds, more than 0"),
        (["parallel.dp=3"], ValueError, r"batch_size=8 over parallel\.dp=3 ranks in 1 microbatches .*multiple of 3"),
        (["parallel.dp=2", "parallel.pp=3"], ValueError, r"batch_size=8 .* in 3 microbatches .*multiple of 6"),
        (
            ["parallel.tp=3", "parallel.sequence_parallel=true"],
            ValueError,
            r"sequence_length=256 over parallel\.tp=3 with sequence_parallel, expected a multiple of 3",
        ),
        (["prompt="], ValueError, r"prompt='', expected some text"),
    ],
)
def test_a_bad_override(words, error, message):
    with pytest.raises(error, match="llmsys.*" + message):
        load_config("demo", words)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.yaml", "stepz: 5", ValueError, r"unknown key stepz in .*a\.yaml"),
        ("a.yaml", "steps: five", TypeError, r"steps='five' in .*a\.yaml, expected an integer"),
        ("a.yaml", "steps: true", TypeError, r"steps=True in .*expected an integer"),
        ("a.yaml", "steps: 5.0", TypeError, r"steps=5\.0 in .*expected an integer"),
        ("a.yaml", "data: {paths: one.txt}", TypeError, r"data\.paths='one\.txt' .*expected a list, each text"),
        ("a.yaml", "data: {paths: [1]}", TypeError, r"data\.paths=1 .*expected text"),
        ("a.yaml", "output: 5", TypeError, r"output=5 .*expected text"),
        ("a.yaml", "steps: 5\nsteps: 6", ValueError, r"key 'steps' given twice"),
        ("a.yaml", "steps: [", ValueError, r"a\.yaml: .*expected a valid yaml file"),
        ("a.yaml", "- 1", TypeError, r"a list at the top, expected keys and values"),
        ("a.json", '{"steps": 5, "steps": 6}', ValueError, r"key 'steps' given twice"),
        ("a.json", "{", ValueError, r"a\.json: .*expected a valid json file"),
        ("a.ini", "", ValueError, r"suffix '\.ini', expected \.yaml, \.toml or \.json"),
    ],
)
def test_a_bad_file(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match="llmsys.*" + message):
        load_config(str(tmp_path / name))


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no-such\.yaml: no such file, expected a config file or one of demo"):
        load_config("no-such.yaml")
