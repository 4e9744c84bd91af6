import dataclasses
import io
import random

import pytest
import torch
from rich.console import Console

from llmsys.models import Llama, load_weights
from llmsys.nn import RMSNorm
from llmsys.train.compare import ROUNDS, agreement, compare, engine_commands, turns
from llmsys.train.comparison import plot_comparison, print_comparison
from llmsys.train.stock import control, stock
from llmsys.train.trainer import fused
from llmsys.train.worker import Worker

from .conftest import TINY


def curve(seed, error=0.0, bias=0.0, steps=100):
    """A falling loss with the same batch noise always; `error` drifts as two runs do, `bias` shifts the end."""
    noise, drift = random.Random(0), random.Random(seed)
    apart, losses = error, []
    for step in range(steps):
        apart *= 1.05 * drift.choice((-1, 1))
        losses.append(8 - 4 * step / steps + noise.gauss(0, 0.1) + min(abs(apart), 0.02) * (1, -1)[apart < 0])
        losses[-1] += bias * step / steps
    return losses


def test_rounding_agrees_and_a_bias_does_not():
    stock, control = curve(1), curve(2, error=1e-6)[:10]
    assert agreement(curve(3, error=1e-6), stock, control).holds
    early = agreement(curve(3, error=1e-4), stock, control)
    assert early.drift > early.drift_limit
    assert not early.holds
    late = agreement(curve(3, error=1e-6, bias=1.0), stock, control)
    assert late.final > late.final_limit
    assert not late.holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llmsys_agrees_and_a_wrong_epsilon_does_not(make_trainer, dtype):
    def losses(engine, eps=1e-6):
        trainer = make_trainer(dtype=dtype, engine=engine)
        for module in trainer.model.modules():
            if isinstance(module, RMSNorm):
                module.eps = eps
        return [trainer.step().loss for _ in range(10)]

    expected, other_roundings = losses(stock), losses(control)
    assert other_roundings != expected
    assert agreement(losses(fused), expected, other_roundings).holds
    wrong = agreement(losses(fused, eps=1e-4), expected, other_roundings)
    assert wrong.drift > wrong.drift_limit


@pytest.mark.parametrize("steps", [2, 12, 13, 100])
def test_turns_are_all_the_steps(steps):
    assert sum(turns(steps)) == steps
    assert len(turns(steps)) == min(steps, ROUNDS)
    assert max(turns(steps)) - min(turns(steps)) <= 1


def test_both_engines_learn_the_same(tokens, tmp_path):
    config = dataclasses.replace(TINY, steps=24)
    runs, control = compare(config, tokens.path, torch.float32, tmp_path / "model.safetensors", Console(quiet=True))
    assert len(control) == 2
    for run in runs.values():
        assert [record.step for record in run.records] == list(range(1, 25))
        assert run.extra_bytes > sum(4 * 4 * weight.numel() for weight in Llama(config.model).parameters())
        assert run.losses[-1] < run.losses[0] - 1
    assert agreement(runs["llmsys"].losses, runs["stock"].losses, control).holds
    load_weights(Llama(config.model), tmp_path / "model.safetensors")

    output = io.StringIO()
    judged = agreement(runs["llmsys"].losses, runs["stock"].losses, control)
    print_comparison(runs, judged, config, 2, gemm_rate=1e11, console=Console(file=output, width=200))
    for part in ("stock PyTorch", "tokens/s", "MFU", "peak memory", "validation loss", "curves agree"):
        assert part in output.getvalue()
    plot_comparison(runs, control, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_worker_that_fails_or_is_gone_says_so(tokens):
    worker = Worker("stock", engine_commands, "stock", TINY, tokens.path, torch.float32)
    try:
        with pytest.raises(RuntimeError, match=r"the stock process failed:\n(?s:.*)No such file"):
            worker.ask("save", "/no/such/folder/file")
        with pytest.raises(RuntimeError, match=r"the stock process ended with exit code 1, expected an answer"):
            worker.ask("steps", 1)
    finally:
        worker.close()
