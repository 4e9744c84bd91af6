import dataclasses
import math

import pytest
import torch

from llmsys.train.config import OptimizerConfig
from llmsys.train.precision import choose_precision
from llmsys.train.step import learning_rate, train_step
from llmsys.train.stock import stock
from llmsys.train.trainer import fused

from .conftest import TINY


def test_accumulation_averages_gradients(make_trainer):
    trainer = make_trainer()
    batches = [next(trainer.train_batches) for _ in range(3)]
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    weights = []
    for parts in (batches, [whole]):
        engine = fused(TINY, torch.float32)
        result = train_step(engine, parts, lr=1e-3, max_grad_norm=math.inf)
        weights.append((result, [weight.detach().clone() for weight in engine.model.parameters()]))
    assert weights[0][0].loss == pytest.approx(weights[1][0].loss, rel=1e-6)
    assert weights[0][0].grad_norm == pytest.approx(weights[1][0].grad_norm, rel=1e-5)
    # where a gradient is near eps, AdamW's first update depends on its last bits; the mean must not
    for a, b in zip(weights[0][1], weights[1][1], strict=True):
        assert (a - b).abs().mean() < 1e-5


@pytest.mark.parametrize("make", [fused, stock])
def test_the_step_is_clipped(make):
    """From the same gradient, AdamW's first moment is the gradient that was applied, times 1 - beta1."""
    batch = (torch.arange(32)[None], torch.arange(32)[None] + 1)

    def applied(max_grad_norm):
        engine = make(TINY, torch.float32)
        norm = train_step(engine, [batch], lr=1e-3, max_grad_norm=max_grad_norm).grad_norm
        moments = [state["exp_avg"] for state in engine.optimizer.state_dict()["state"].values()]
        return norm, math.sqrt(sum(moment.double().square().sum().item() for moment in moments)) / (1 - 0.9)

    norm, free = applied(1e3)
    assert free == pytest.approx(norm, rel=1e-5)
    same_norm, clipped = applied(norm / 7)
    assert same_norm == norm
    assert clipped == pytest.approx(norm / 7, rel=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing():
    engine = fused(TINY, torch.float32)
    model = engine.model
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before = [weight.detach().clone() for weight in model.parameters()]
    batch = (torch.arange(32)[None], torch.arange(32)[None])
    with pytest.raises(RuntimeError, match=r"loss nan and gradient norm nan, expected finite numbers"):
        train_step(engine, [batch], lr=1.0, max_grad_norm=1.0)
    for weight, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=0, atol=0, equal_nan=True)


def test_learning_rate():
    config = OptimizerConfig(lr=1.0, final_lr_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(step, 105, config) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.55)  # half-way down
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert learning_rate(0, 1, dataclasses.replace(config, warmup_steps=0)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_step_is_the_same_step(make_trainer, dtype):
    ours, theirs = make_trainer(dtype=dtype), make_trainer(dtype=dtype, engine=stock)
    assert {type(module).__name__ for module in theirs.model.modules()} >= {"StockRMSNorm", "StockMLP"}
    pairs = [(ours.step().loss, theirs.step().loss) for _ in range(5)]
    for a, b in pairs:
        assert a == pytest.approx(b, rel=4 * torch.finfo(dtype).eps)
    assert pairs[-1][0] < pairs[0][0]


def test_bfloat16_masters_keep_what_bfloat16_loses(make_trainer):
    """At this rate an update is under half a bfloat16 unit of most weights: without masters they would never move."""
    trainer = make_trainer(dtype=torch.bfloat16, steps=40)
    wq = trainer.model.blocks[0].attention.wq.weight
    batch = [next(trainer.train_batches)]
    start = wq.detach().clone()
    for _ in range(40):
        train_step(trainer.engine, batch, lr=1e-5, max_grad_norm=1.0)
    assert (wq != start).float().mean() > 0.5


def test_bfloat16_gradients_accumulate_in_float32(make_trainer):
    model = make_trainer(dtype=torch.bfloat16, accumulation=2).model
    model.loss(torch.arange(32)[None], torch.arange(32)[None]).backward()
    assert {weight.grad.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "rates", "expected"),
    [
        ("auto", {torch.float32: 75e9, torch.bfloat16: 11e9}, torch.float32),
        ("auto", {torch.float32: 225e9, torch.bfloat16: 900e9}, torch.bfloat16),
        ("bfloat16", {}, torch.bfloat16),
        ("float32", {}, torch.float32),
    ],
)
def test_precision(precision, rates, expected):
    chosen = choose_precision(precision, rates.__getitem__)
    assert chosen.dtype == expected
    if precision == "auto":
        assert f"float32 {rates[torch.float32] / 1e9:.0f}" in chosen.reason
