import pytest
import torch

from llmsys import rope, rope_qk, rope_tables
from llmsys.ops._op import use
from llmsys.ops.rope import OP as ROPE
from llmsys.ops.rope_qk import OP, cases
from tests.harness import DTYPES, checks, runners, same_bits

SURFACE = {"rope_qk": "(q, k, cos, sin, *, interleaved=False, out=None)"}

runners(ROPE)  # its emulated and simulated implementations are called below too
by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def projected(dtype=torch.float32, device="cpu", heads=6, kv_heads=2, head_dim=32):
    """q, k and v as views of one (B, T, (Hq + 2·Hkv)·K) projection."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, (heads + 2 * kv_heads) * head_dim, generator=generator).to(device, dtype)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=2)
    return qkv, q, k, v


@by_runner
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_rope_of_each_also_in_a_fused_projection(runner, interleaved, dtype):
    """Read where they are, and rotated in place there: v and what is beside them stay."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    qkv, q, k, v = projected(dtype, runner.device)
    cos, sin = rope_tables(torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]]), 24, device=runner.device)
    v_before = v.clone()
    with runner.selected(), use(rope=runner.implementation, rope_qk=runner.implementation):
        expected = [rope(x, cos, sin, interleaved=interleaved) for x in (q, k)]
        for ours, one in zip(rope_qk(q, k, cos, sin, interleaved=interleaved), expected, strict=True):
            assert same_bits(ours, one)
        result = rope_qk(q, k, cos, sin, interleaved=interleaved, out=(q, k))
    assert result[0] is q and result[1] is k
    assert same_bits(q, expected[0]) and same_bits(k, expected[1]) and same_bits(v, v_before)


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
@pytest.mark.parametrize("interleaved", [False, True])
def test_large_enough_to_stream(runner, interleaved):
    """Outputs beyond the last cache take another way to memory, in place too."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    from llmsys import _C

    tokens = max(64, _C.cpu.last_level_cache_bytes() // (10 * 128 * 2))
    qkv = torch.randn(1, tokens, 14 * 128).bfloat16()
    q, k, _ = qkv.unflatten(-1, (-1, 128)).split((8, 2, 4), dim=2)
    cos, sin = rope_tables(tokens, 128)
    forward = OP.implementations["cpu"].forward
    pieces = [slice(begin, begin + 16) for begin in range(0, tokens, tokens // 4)]
    with runner.selected():
        expected = [forward(q[:, p], k[:, p], cos[p], sin[p], interleaved) for p in pieces]
        fresh = forward(q, k, cos, sin, interleaved)
        forward(q, k, cos, sin, interleaved, out=(q, k))
    for piece, both in zip(pieces, expected, strict=True):
        for ours, placed, wanted in zip(fresh, (q, k), both, strict=True):
            assert same_bits(ours[:, piece], wanted) and same_bits(placed[:, piece], wanted)


def test_gradient_keeps_the_tables_alone():
    _, q, k, _ = projected()
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor):
        rope_qk(q, k, *rope_tables(5, 32))
    assert kept == [(5, 16), (5, 16)]


def arguments(**changed) -> dict:
    cos, sin = rope_tables(5, 32)
    _, q, k, _ = projected()
    return {"q": q, "k": k, "cos": cos, "sin": sin, **changed}


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (
            {"q": torch.ones(2, 4, 6, 32)},
            ValueError,
            r"cos and sin have .* and q \(2, 4, 6, 32\), expected",
        ),
        ({"k": torch.ones(2, 5, 2, 16)}, ValueError, r"k has shape \(2, 5, 2, 16\) on cpu and q \(2, 5, 6, 32\)"),
        ({"k": torch.ones(2, 5, 32)}, ValueError, r"k has shape \(2, 5, 32\)"),
        ({"k": torch.ones(2, 5, 2, 32).half()}, TypeError, "k is torch.float16, expected torch.float32, as q is"),
        ({"out": (torch.ones(2, 5, 6, 32), torch.ones(2, 5, 2, 31))}, ValueError, "out is .* expected contiguous"),
    ],
)
def test_error(changed, error, message):
    with pytest.raises(error, match="llmsys.rope_qk: .*" + message):
        rope_qk(**arguments(**changed))


def test_in_place_where_elements_share_memory():
    q = torch.ones(2, 5, 1, 32).expand(2, 5, 6, 32)
    with pytest.raises(ValueError, match="llmsys.rope_qk: out is .* expected contiguous"):
        rope_qk(**arguments(q=q, out=(q, torch.empty(2, 5, 2, 32))))
