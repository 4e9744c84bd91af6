import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llmsys import attention, env
from llmsys.ops.attention import OP, cases
from tests.harness import checks, fused_projection, heads_first, runners, same_bits

SURFACE = {
    "attention": "(q, k, v, *, causal=False, scale=None, window=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None, "
    "bias=None, block_mask=None, block_size=64, dropout_p=0.0, seed=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "return_lse=False)"
}

by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def drawn(*shape: int, heads: tuple[int, int] = (4, 2), dim: int = 16, dtype=torch.float64):
    """q, k and v of (tokens of q, tokens of k), with a batch of two."""
    queries, keys = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, queries, heads[0], dim), (2, keys, heads[1], dim), (2, keys, heads[1], dim))
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


def test_is_torchs_attention():
    q, k, v = drawn(9, 9)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, causal=True), expected)


@by_runner
def test_ends_together(runner):
    """Causal with fewer or more queries than keys: the last sees all; those before the first key see nothing."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    for queries, keys in ((2, 5), (5, 2)):
        q, k, v = (x.bfloat16().to(runner.device) for x in drawn(queries, keys))
        with runner.selected():
            y, lse = OP.implementations[runner.implementation].forward(
                *(q, k, v, None, None, None, None, None, None, 64, -1, 0, 0.25, 0.0, 0.0, 0)
            )
        for t in range(queries):
            seen = t + keys - queries + 1
            if seen <= 0:
                assert (y[:, t] == 0).all() and (lse[:, :, t] == -math.inf).all()
                continue
            alone = attention(*(x.double() for x in (q[:, t : t + 1], k[:, :seen], v[:, :seen])), scale=0.25)
            torch.testing.assert_close(y[:, t].double(), alone[:, 0], rtol=2e-2, atol=2e-2)


@by_runner
def test_a_query_that_sees_nothing(runner):
    """Zeros, lse -inf and gradients of zero, whether a mask hides the keys or a bias of -inf."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    q, k, v = (x.bfloat16().to(runner.device) for x in drawn(20, 20))
    hidden = torch.zeros(1, 1, 20, 20, dtype=torch.bfloat16, device=runner.device)
    hidden[..., 3, :] = -math.inf
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=runner.device)
    blocks[..., 1, :] = False
    implementation = OP.implementations[runner.implementation]
    for bias, mask, blind in ((hidden, None, slice(3, 4)), (None, blocks, slice(16, 20))):
        args = (q, k, v, bias, None, None, None, None, mask, 16, -1, 0, 0.25, 0.0, 0.0, 0)
        if implementation.reason(runner.device, args):
            continue
        with runner.selected():
            y, lse = implementation.forward(*args)
            assert (y[:, blind] == 0).all() and (lse[:, :, blind] == -math.inf).all()
            dq, dk, dv, *_ = implementation.backward(torch.ones_like(y), None, y, lse, *args, False)
        assert (dq[:, blind] == 0).all()
        assert all(grad.isfinite().all() for grad in (dq, dk, dv))


@by_runner
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_special_values_stay_in_their_row(runner, value):
    """A query that is no number spoils its own row alone."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    q, k, v = (x.bfloat16().to(runner.device) for x in drawn(20, 20))
    spoilt = q.clone()
    spoilt[0, 5, 1, 3] = value
    args = (None, None, None, None, None, None, 64, -1, 0, 0.25, 0.0, 0.0, 0)
    with runner.selected():
        forward = OP.implementations[runner.implementation].forward
        (y, _), (expected, _) = forward(spoilt, k, v, *args), forward(q, k, v, *args)
    assert y[0, 5, 1].isnan().all()
    y[0, 5, 1] = expected[0, 5, 1]
    assert torch.equal(y, expected)


def test_packed_is_each_alone():
    q, k, v = (x[0] for x in drawn(30, 40, dtype=torch.float32))
    starts_q, starts_k = ([0, 7, 7, 19, 30], [0, 12, 15, 15, 40])
    cu_q, cu_k = (torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k))
    y, lse = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, return_lse=True)
    for i in range(4):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        alone, its_lse = attention(q[None, rows], k[None, keys], v[None, keys], causal=True, return_lse=True)
        torch.testing.assert_close(y[rows], alone[0])
        torch.testing.assert_close(lse[:, rows], its_lse[0])


@by_runner
@pytest.mark.parametrize("layout", [heads_first, fused_projection], ids=lambda layout: layout.__name__)
def test_layouts_of_projections(runner, layout):
    """Heads before tokens, and thirds of one projection, give the bits that contiguous tensors give."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    q, k, v = (x.bfloat16().to(runner.device) for x in drawn(33, 33, heads=(2, 2), dim=32))
    args = (None, None, None, None, None, None, 64, -1, 0, 0.2, 0.0, 0.0, 0)
    implementation = OP.implementations[runner.implementation]
    with runner.selected():
        outcomes = []
        for change in (lambda x: x, layout):
            given = [change(x) for x in (q, k, v)]
            y, lse = implementation.forward(*given, *args)
            dy = change(torch.ones_like(y))
            outcomes.append([y, lse, *implementation.backward(dy, None, y, lse, *given, *args, False)[:3]])
    for plain, other in zip(*outcomes, strict=True):
        assert same_bits(plain, other)


def test_memory_grows_with_the_length():
    """Forward and backward of one head over 32768 tokens add less than 64 MiB to inputs and outputs."""
    script = (
        "import resource, torch, llmsys\n"
        "def peak(tokens):\n"
        "    q, k, v = (torch.zeros(1, tokens, 1, 128, dtype=torch.bfloat16).requires_grad_() for _ in range(3))\n"
        "    llmsys.attention(q, k, v, causal=True).backward(torch.zeros(1, tokens, 1, 128, dtype=torch.bfloat16))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(peak(64), peak(32768))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = (int(field) / 1024 for field in run.stdout.split())
    inputs_and_outputs = 8 * 32768 * 128 * 2 / 2**20  # q, k, v, y, dy, dq, dk, dv
    assert after - before - inputs_and_outputs < 64


def test_dropout_keeps_the_mean_and_repeats():
    q, k, v = drawn(64, 64, dtype=torch.float32)
    kept = attention(q, k, torch.ones_like(v), dropout_p=0.25, seed=3)
    assert abs(kept.mean().item() - 1) < 0.02
    assert same_bits(kept, attention(q, k, torch.ones_like(v), dropout_p=0.25, seed=3))
    assert not torch.equal(kept, attention(q, k, torch.ones_like(v), dropout_p=0.25, seed=4))


Q, K, V = (torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 6))
CU = torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (ValueError, "expected q (B, T, H, D), k (B, S, K, D)", (Q, K[..., :7], V), {}),
        (ValueError, "one batch size", (Q[:1], K, V), {}),
        (ValueError, "expected H=4 to be a multiple of K=3", (Q, torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 3, 6)), {}),
        (ValueError, "a head dim D from 1 to 256", (torch.zeros(2, 3, 4, 300), torch.zeros(2, 5, 2, 300), V), {}),
        (TypeError, "k is torch.bfloat16, expected torch.float32", (Q, K.bfloat16(), V), {}),
        (TypeError, "q is torch.int64", (Q.long(), K.long(), V.long()), {}),
        (ValueError, "window is (-2, 0)", (Q, K, V), {"window": (-2, 0)}),
        (ValueError, "softcap is -1", (Q, K, V), {"softcap": -1.0}),
        (ValueError, "dropout_p is 1.0", (Q, K, V), {"dropout_p": 1.0, "seed": 1}),
        (ValueError, "seed None, expected a seed", (Q, K, V), {"dropout_p": 0.5}),
        (
            ValueError,
            "bias has shape (3, 5), expected (B, H, T, S) = (2, 4, 3, 5)",
            (Q, K, V),
            {"bias": torch.zeros(3, 5)},
        ),
        (ValueError, "sinks has shape (2,), expected one of [(4,)]", (Q, K, V), {"sinks": torch.zeros(2)}),
        (ValueError, "alibi_slopes has shape (4, 4)", (Q, K, V), {"alibi_slopes": torch.zeros(4, 4)}),
        (TypeError, "block_mask is torch.float32", (Q, K, V), {"block_mask": torch.zeros(1, 1, 1, 1)}),
        (ValueError, "= (2, 4, 1, 1)", (Q, K, V), {"block_mask": torch.zeros(1, 1, 2, 1, dtype=torch.bool)}),
        (ValueError, "cu_seqlens_k is None", (Q[0], K[0], V[0]), {"cu_seqlens_q": CU}),
        (ValueError, "for 3 tokens", (Q[0], K[0], V[0]), {"cu_seqlens_q": CU + 1, "cu_seqlens_k": CU}),
        (TypeError, "cu_seqlens_q is torch.int64", (Q[0], K[0], V[0]), {"cu_seqlens_q": CU.long(), "cu_seqlens_k": CU}),
        (ValueError, "with cu_seqlens q (total_q, H, D)", (Q, K, V), {"cu_seqlens_q": CU, "cu_seqlens_k": CU}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(error, message, args, options):
    with pytest.raises(error, match=re.escape(message)):
        attention(*args, **options)


def test_large_on_a_gpu_is_tritons():
    """Where both can run; small ones, whose launch is most of the time, are the native kernels'."""
    native = OP.implementations["cuda"]
    for tokens, slower in ((1024, False), (8192, True)):
        q = torch.empty(2, tokens, 32, 128, device="meta", dtype=torch.bfloat16)
        assert (native.slower((q, q, q)) is not None) == (slower and env.has("triton"))
