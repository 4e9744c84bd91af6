"""The harness on a tiny op: right ones are timed, wrong ones are not, and everyone is in the table."""

from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch

import llmsys
from benchmarks import contest, gate, harness
from benchmarks.contest import Case
from benchmarks.peers import Peer, torch_peers
from llmsys import _C
from llmsys.ops import _op
from llmsys.ops._op import Impl, Op
from llmsys.perf.ceilings import NATIVE_BLOCK_BYTES
from llmsys.perf.timer import Timing

SHAPE = (8, 32)


def forward(x, weight, scale, out=None):
    y = (x.to(torch.promote_types(x.dtype, torch.float32)) * weight * scale).to(x.dtype)
    return y if out is None else out.copy_(y)


def backward(dy, x, weight, scale, out=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = (dy.to(wide) * weight * scale).to(x.dtype)
    dweight = (dy.to(wide) * x * scale).sum(0).to(weight.dtype)
    return (dx if out is None else out.copy_(dx)), dweight


def slightly_wrong(x, weight, scale, out=None):
    y = forward(x, weight, scale, out)
    y[3, 5] *= 1.05
    return y


def forgetful(x, weight, scale, out=None):
    """Leaves one element of a given output as it was."""
    y = forward(x, weight, scale)
    if out is None:
        return y
    out.view(-1)[1:] = y.view(-1)[1:]
    return out


with mock.patch.object(_op, "_ops", {}):  # only the tests below shall find it among llmsys's ops
    OP = Op(
        "bench_probe",
        forward="(Tensor x, Tensor weight, float scale=2.0) -> (Tensor y)",
        backward="(Tensor dy, Tensor x, Tensor weight, float scale) -> (Tensor dx, Tensor dweight)",
        implementations=[
            Impl("cannot", forward, backward, lambda *args: "never can"),
            Impl("cpu", forward, backward),
            Impl("wrong", slightly_wrong, backward),
            Impl("forgetful", forgetful, backward),
            Impl("reference", forward, backward),
        ],
    )


def inputs(shape, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)
    return (*(tensor.to(device, dtype) for tensor in tensors), 2.0)


def traffic(direction, x, weight, scale):
    return (2 if direction == "forward" else 3) * x.nbytes


CASES = ModuleType("cases")
CASES.LARGE, CASES.inputs, CASES.traffic = (SHAPE,), inputs, traffic
CASES.flops = lambda direction, x, *rest: 2 * x.numel()


def formula(x, weight, scale):
    return x * weight * scale


PEERS = (
    *torch_peers(formula)[:1],
    Peer("absent", lambda: None, "no_such_package.inner"),
    Peer("elsewhere", lambda: None, "torch", "cuda"),
)


@pytest.fixture(autouse=True)
def public(monkeypatch):
    """`llmsys.bench_probe`, one set of buffers per case, and few rounds."""
    monkeypatch.setitem(_op._ops, OP.name, OP)
    monkeypatch.setattr(llmsys, "bench_probe", lambda x, weight, *, scale=2.0: OP(x, weight, scale), raising=False)
    for module in (harness, contest):
        monkeypatch.setattr(module, "sets_for_cold_caches", lambda set_bytes, device: 3)
    monkeypatch.setattr(contest, "bandwidth", lambda device: SimpleNamespace(copy=1e9))


def run(*cases):
    return harness.bench_op(OP, CASES, formula, PEERS[1:]).run(cases, budget_s=0.01)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ready(direction, dtype):
    rows = {row.impl: row for row in run(Case("ready", direction, SHAPE, dtype))}
    narrower = {f"cpu[{isa}]" for isa in _C.cpu.isas() if isa != _C.cpu.isa()}
    assert set(rows) == {*OP.implementations, *narrower}
    assert rows["cannot"].why_not == "never can" and rows["cannot"].median_s is None
    for name in ("cpu", "reference", *narrower):
        row = rows[name]
        assert row.correct and row.median_s > 0 and row.quartiles_s[0] <= row.median_s <= row.quartiles_s[1]
        assert row.copy_bytes_per_s > 0 and 0 < row.ceiling_percent < 100.1 * row.bytes / 1e9 / row.median_s
    assert rows["cpu"].bytes == (2 if direction == "forward" else 3) * 256 * getattr(torch, dtype).itemsize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_results_get_no_time(dtype):
    rows = {row.impl: row for row in run(Case("ready", "forward", SHAPE, dtype))}
    for name, reason in {"wrong": "wrong: y: error", "forgetful": "wrong: out= gets other bits"}.items():
        assert rows[name].correct is False
        assert rows[name].median_s is None and rows[name].ceiling_percent is None
        assert rows[name].why_not.startswith(reason)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_public_runs_the_chosen_and_every_peer(direction):
    (row,) = run(Case("public", direction, SHAPE))
    assert row.impl == "cpu" and row.correct and row.median_s > 0
    assert row.peers["eager"] > 0
    assert row.peers["absent"] is None and row.peers_why_not["absent"] == "not installed"
    assert row.peers_why_not["elsewhere"] == "runs on cuda only"
    assert row.bytes == (2 if direction == "forward" else 2 + 3) * 512


def test_public_wrong():
    with llmsys.use(bench_probe="wrong"):
        (row,) = run(Case("public", "forward", SHAPE))
    assert row.correct is False and row.median_s is None and row.peers["eager"] > 0


def test_warm_case_has_one_set_and_no_ceiling():
    warm = harness.op_contest(OP, CASES, PEERS, Case("public", "forward", SHAPE, caches="warm"))
    assert warm.num_sets == 1
    assert contest.time_contest(warm, budget_s=0.01)[0].ceiling_percent is None


@pytest.mark.parametrize("copy_s, ceiling", [(1e-3, 2e9), (4e-3, 1e9)])
def test_ceiling_is_the_best_copy_of_run_and_rounds(monkeypatch, copy_s, ceiling):
    moved = 2 * NATIVE_BLOCK_BYTES * 16
    seconds = {("impl", "cpu"): 4e-3, ("copy", ""): copy_s * moved / 2e6}
    timings = {name: Timing((value, 2 * value, 2 * value)) for name, value in seconds.items()}
    monkeypatch.setattr(contest, "time_interleaved", lambda calls, **options: timings)
    entered = contest.Contest("bench_probe", Case("ready", "forward", SHAPE), bytes=moved)
    entered.implementations["cpu"] = lambda index: None
    (row,) = contest.time_contest(entered)
    assert row.ceiling_percent == pytest.approx(100 * (moved / ceiling) / 8e-3)
    assert row.copy_bytes_per_s == pytest.approx(2e6 / copy_s / 2)


def test_default_plan_is_every_way_of_every_large_shape():
    plan = harness.bench_op(OP, CASES, formula).plan
    assert [(case.mode, case.direction) for case in plan] == list(harness.WAYS)


def test_backward_arguments_follow_the_names():
    args = inputs(SHAPE, torch.float32)
    dy, x, weight, scale = harness.backward_args(OP, args)
    assert dy.shape == args[0].shape and x is args[0] and weight is args[1] and scale == 2.0


def test_large_results():
    x, weight, scale = inputs(SHAPE, torch.float32)
    dx, dweight = backward(x, x, weight, scale)
    assert harness.large_results((dx, dweight)) is dx
    assert harness.large_results((dx, x)) == (dx, x)


def test_the_instruction_set_comes_back_after_a_failure():
    used = _C.cpu.isa()

    def failing(*args):
        raise ValueError("as planned")

    with pytest.raises(ValueError, match="as planned"):
        gate.under("baseline", failing)()
    assert _C.cpu.isa() == used


def test_public_call_binds_keywords_by_name():
    def function(x, weight, eps=1.0, *, offset=0.0):
        return x, weight, eps, offset

    assert harness.public_call(function, ("x", "weight", "eps", "offset"))(1, 2, 3, 4) == (1, 2, 3, 4)
    assert harness.public_call(function, ("offset", "x", "weight"))(4, 1, 2) == (1, 2, 1.0, 4)
