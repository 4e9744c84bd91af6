import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llmsys import embedding
from llmsys.ops._op import use
from llmsys.ops.embedding import OP, cases
from tests.harness import DTYPES, checks, runners, same_bits

SURFACE = {"embedding": "(ids, weight, padding_idx=None, *, out=None)"}

by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def gradient(runner, ids, weight, dy, padding_idx=None):
    if runner.why_not:
        pytest.skip(runner.why_not)
    with runner.selected(), use(embedding=runner.implementation):
        weight = weight.detach().requires_grad_()
        (dweight,) = torch.autograd.grad(embedding(ids, weight, padding_idx), weight, dy)
    return dweight


@by_runner
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 1, -1])
def test_is_torchs(runner, dtype, padding_idx):
    ids = torch.tensor([[4, 1, 0], [1, 4, 4]], device=runner.device)
    weight, dy = (torch.randn(shape, device=runner.device).to(dtype) for shape in ((5, 9), (2, 3, 9)))
    dweight = gradient(runner, ids, weight, dy, padding_idx)
    wide = weight.double().requires_grad_()
    y = F.embedding(ids, wide, padding_idx)
    with runner.selected(), use(embedding=runner.implementation):
        assert same_bits(embedding(ids, weight, padding_idx), y.to(dtype))
    (expected,) = torch.autograd.grad(y, wide, dy.double())
    torch.testing.assert_close(dweight, expected.to(dtype))
    assert (dweight[[2, 3]] == 0).all()


@by_runner
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_summed_in_order_in_float32(runner, dtype):
    """Bit for bit, where one id has most of the positions and rows are wider than a tile of sums."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (60,), generator=generator).clamp(max=3)
    dy = torch.randn(60, 2100, generator=generator).to(dtype)
    sums = torch.zeros(7, 2100)
    for position, id in enumerate(ids.tolist()):
        sums[id] += dy[position].float()
    weight, ids, dy = (tensor.to(runner.device) for tensor in (torch.zeros(7, 2100, dtype=dtype), ids, dy))
    assert same_bits(gradient(runner, ids, weight, dy).cpu(), sums.to(dtype))


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(runner, threads):
    weight, ids, _ = cases.inputs((700, 1030), torch.bfloat16, rows=333)
    dy = torch.randn(700, 1030).bfloat16()
    before = torch.get_num_threads()
    expected = gradient(runner, ids, weight, dy)
    try:
        torch.set_num_threads(threads)
        assert same_bits(gradient(runner, ids, weight, dy), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
def test_large_enough_to_stream(runner):
    """Results beyond the last cache take another way to memory."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    from llmsys import _C

    rows = max(64, _C.cpu.last_level_cache_bytes() // 4096)
    weight, ids, _ = cases.inputs((rows, 2048), torch.bfloat16)
    implementation = OP.implementations["cpu"]
    with runner.selected():
        assert same_bits(implementation.forward(weight, ids, None), weight[ids])
        dweight = implementation.backward(weight, weight, ids, None)
    for id in (0, 1, rows // 2, rows - 1):
        assert same_bits(dweight[id], implementation.backward(weight, weight, ids, None)[id])
        torch.testing.assert_close(dweight[id].float(), weight[ids == id].float().sum(0), rtol=2**-8, atol=1e-3)


# ---- errors ----


@by_runner
@pytest.mark.parametrize("bad", [5, -1, 2**40, -(2**63)])
def test_ids_out_of_range(runner, bad):
    assert_refused(
        runner, [[0, 4], [bad, -7]], 5, f"llmsys.embedding: ids has {bad} at position 2, expected numbers in [0, 5)"
    )


@by_runner
def test_an_empty_table(runner):
    if runner.why_not:
        pytest.skip(runner.why_not)
    ids, weight = torch.tensor([], dtype=torch.int64, device=runner.device), torch.randn(0, 9, device=runner.device)
    with runner.selected(), use(embedding=runner.implementation):
        assert embedding(ids, weight).shape == (0, 9)
    assert_refused(runner, [0], 0, "ids has 0 at position 0, expected numbers in [0, 0)")


def assert_refused(runner, ids, rows, message):
    """By an IndexError with `message`; on a GPU by its assertion, after which a process can use it no more."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    if runner.device == "cpu":
        with (
            runner.selected(),
            use(embedding=runner.implementation),
            pytest.raises(IndexError, match=re.escape(message)),
        ):
            embedding(torch.tensor(ids), torch.randn(rows, 9))
        return
    code = (
        f"import torch, llmsys; ids = torch.tensor({ids}, device='cuda')\n"
        f"with llmsys.use(embedding={runner.implementation!r}):\n"
        f"    llmsys.embedding(ids, torch.randn({rows}, 9, device='cuda')); torch.cuda.synchronize()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode != 0 and "device-side assert" in process.stderr


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"ids": torch.ones(3)}, TypeError, "ids is torch.float32, expected torch.int64 or torch.int32"),
        ({"weight": torch.ones(5, 9).int()}, TypeError, "weight is torch.int32, expected float32"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\), expected \(V, D\)"),
        ({"weight": torch.ones(5, 9, device="meta")}, ValueError, "ids is on cpu and weight on meta, expected one"),
        ({"padding_idx": 5}, ValueError, r"padding_idx is 5, expected a number in \[-5, 5\)"),
        ({"out": torch.empty(3, 8)}, ValueError, r"out is \(3, 8\) .* expected contiguous \(3, 9\)"),
    ],
)
def test_error(changed, error, message):
    arguments = {"ids": torch.tensor([0, 1, 4]), "weight": torch.ones(5, 9), **changed}
    with pytest.raises(error, match="llmsys.embedding: .*" + message):
        embedding(**arguments)
