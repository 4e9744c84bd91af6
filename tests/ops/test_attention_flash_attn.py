"""The implementation `flash_attn` of `attention`: what it asks the package for, and what it refuses.

Where there is no flash-attn, a stand-in takes the place of `flash_attn.flash_attn_interface`: the signatures of its
releases 2.7 and 2.8, the checks of their C++, the results of the reference, and what differs from `llmsys.attention`.
"""

from __future__ import annotations

import math
import re
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import llmsys
from llmsys import env
from llmsys.ops._op import use
from llmsys.ops._verify import verify
from llmsys.ops.attention import OP, cases, flash_attn, reference
from llmsys.ops.attention.arguments import Arguments
from tests.harness import LAYOUTS, fused_projection, heads_first, same_bits

INTERFACE = "flash_attn.flash_attn_interface"
INSTALLED = torch.cuda.is_available() and env.release("flash-attn") is not None


# ---- the stand-in ----


def check(q, k, v, *more, dropout_p, softcap):
    """Those of flash_api.cpp, and the alignment of what it reads 16 bytes at a time."""
    dim = q.shape[-1]
    assert q.dtype in (torch.float16, torch.bfloat16) and len({x.dtype for x in (q, k, v, *more)}) == 1
    assert dim <= 256 and dim % 8 == 0 and q.numel() and k.numel()
    assert k.shape == v.shape and k.shape[-1] == dim and q.shape[-2] % k.shape[-2] == 0
    assert all(x.shape == q.shape for x in more)
    for x in (q, k, v, *more):
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:-1])
    assert dropout_p == 0 or softcap == 0


def seen_by_flash(seqlen_q, seqlen_k, causal, left, right, alibi_slopes):
    """(causal, left, right) as flash_api.cpp makes them of what it is given, of the longest sequences."""
    left, right = (-1 if size >= seqlen_k else size for size in (left, right))
    if seqlen_q == 1 and alibi_slopes is None:
        causal = False
    if causal:
        right = 0
    causal = left < 0 and right == 0
    if left < 0 <= right:
        left = seqlen_k
    if left >= 0 > right:
        right = seqlen_k
    return causal, left, right


def reference_arguments(q, k, v, scale, left, right, softcap, alibi_slopes):
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32 and alibi_slopes.stride(-1) == 1
        assert alibi_slopes.shape in ((q.shape[2],), (q.shape[0], q.shape[2]))
        alibi_slopes = alibi_slopes.expand(q.shape[0], -1)
    return q, k, v, None, None, alibi_slopes, None, None, None, 64, left, right, scale, softcap, 0.0, 0


def excess(q, k, alibi_slopes, causal):
    """Of lse, under causal ALiBi."""
    if alibi_slopes is None or not causal:
        return 0.0
    place = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    return alibi_slopes.unsqueeze(-1) * place


def sequence_forward(q, k, v, scale, causal, left, right, softcap, alibi_slopes):
    y, lse = reference.forward(*reference_arguments(q, k, v, scale, left, right, softcap, alibi_slopes))
    lse = torch.where(lse.isneginf() | lse.isnan(), math.inf, lse + excess(q, k, alibi_slopes, causal))
    return y, lse


def sequence_backward(dout, q, k, v, out, lse, scale, causal, left, right, softcap, alibi_slopes):
    assert not lse.isneginf().any(), "-inf - -inf is NaN: the kernels know +inf"
    lse = torch.where(lse.isposinf(), -math.inf, lse - excess(q, k, alibi_slopes, causal))
    given = reference_arguments(q, k, v, scale, left, right, softcap, alibi_slopes)
    return reference.backward(dout, None, out, lse, *given, False)[:3]


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    check(q, k, v, dropout_p=dropout_p, softcap=softcap)
    seen = seen_by_flash(q.shape[1], k.shape[1], causal, window_size_left, window_size_right, alibi_slopes)
    y, lse = sequence_forward(q, k, v, softmax_scale, *seen, softcap, alibi_slopes)
    return y, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    check(q, k, v, dout, out, dropout_p=dropout_p, softcap=softcap)
    assert deterministic and softmax_lse.is_contiguous()
    seen = seen_by_flash(q.shape[1], k.shape[1], causal, window_size_left, window_size_right, alibi_slopes)
    found = sequence_backward(dout, q, k, v, out, softmax_lse, softmax_scale, *seen, softcap, alibi_slopes)
    for buffer, gradient in zip((dq, dk, dv), found, strict=True):
        buffer.copy_(gradient)


def sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """(index, its rows of q, its rows of k) of each that has queries or keys."""
    assert q.dim() == k.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert starts_q[-1] <= len(q) and starts_k[-1] <= len(k)
    assert max_seqlen_q > 1 or len(q) == len(starts_q) - 1, "takes q as one token of each sequence"
    for i, (rows, keys) in enumerate(zip(pairwise(starts_q), pairwise(starts_k), strict=True)):
        assert rows[1] - rows[0] <= max_seqlen_q and keys[1] - keys[0] <= max_seqlen_k
        yield i, slice(*rows), slice(*keys)


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None,
):  # fmt: skip
    check(q, k, v, dropout_p=dropout_p, softcap=softcap)
    seen = seen_by_flash(max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right, alibi_slopes)
    out, softmax_lse = torch.full_like(q, math.nan), torch.full((q.shape[1], len(q)), math.nan, device=q.device)
    for i, rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        slopes = None if alibi_slopes is None else alibi_slopes[i : i + 1]
        y, lse = sequence_forward(q[None, rows], k[None, keys], v[None, keys], softmax_scale, *seen, softcap, slopes)
        out[rows], softmax_lse[:, rows] = y[0], lse[0]
    return out, softmax_lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    check(q, k, v, dout, out, dropout_p=dropout_p, softcap=softcap)
    assert deterministic and softmax_lse.is_contiguous()
    seen = seen_by_flash(max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right, alibi_slopes)
    for buffer in (dq, dk, dv):
        buffer.fill_(math.nan)
    for i, rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        slopes = None if alibi_slopes is None else alibi_slopes[i : i + 1]
        its = (x[None, rows] for x in (dout, q)), (x[None, keys] for x in (k, v))
        lse = softmax_lse[None, :, rows]
        found = sequence_backward(*its[0], *its[1], out[None, rows], lse, softmax_scale, *seen, softcap, slopes)
        dq[rows], dk[keys], dv[keys] = (gradient[0] for gradient in found)


STAND_IN = types.ModuleType(INTERFACE)
for function in (_flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward):
    setattr(STAND_IN, function.__name__, function)


def refusal(*args):
    return flash_attn.inexpressible(Arguments(*args))


@pytest.fixture(params=["stand-in", "installed"])
def device(request, monkeypatch):
    """Where `flash_attn` runs: on the CPU the stand-in, on a GPU the package."""
    if request.param == "installed":
        if not INSTALLED:
            pytest.skip("needs a GPU and flash-attn")
        return "cuda"
    monkeypatch.setitem(__import__("sys").modules, INTERFACE, STAND_IN)
    on_cpu = replace(
        OP.implementations["flash_attn"], devices=None, why_not=lambda *a: flash_attn.inexpressible(Arguments(*a))
    )
    monkeypatch.setitem(OP.implementations, "flash_attn", on_cpu)
    return "cpu"


# ---- right where it answers ----

SHAPES = (
    *((1, 15, 17, 2, 1, 16, 16), (2, 40, 33, 2, 1, 96, 96), (1, 29, 130, 3, 1, 32, 32), (2, 70, 70, 4, 2, 64, 64)),
    *((2, 1, 9, 4, 2, 8, 8), (1, 0, 5, 2, 1, 8, 8), (2, 4, 0, 2, 2, 8, 8), (0, 3, 3, 1, 1, 8, 8)),
)
ANSWERED = (
    {},
    {"causal": False},
    {"window": (5, 0)},
    {"window": (70, 0)},
    {"scale": 0.4},
    {"spread": 6.0},
    {"softcap": 2.0},
    {"alibi": True},
    {"causal": False, "alibi": True, "softcap": 3.0},
    {"window": (6, 0), "alibi": True},
    {"packed": True},
    {"packed": True, "causal": False},
    {"packed": True, "causal": False, "window": (3, 2)},
    {"packed": True, "causal": False, "window": (3, -1)},
    {"packed": True, "causal": False, "window": (-1, 4), "softcap": 2.0},
    {"packed": True, "alibi": True},
    {"packed": True, "causal": False, "alibi": True},
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ANSWERED, ids=str)
def test_right(device, variant, dtype):
    """Results and all gradients, that of lse among them."""
    for shape in SHAPES:
        for verdict in verify(OP, cases, "flash_attn", shape, dtype, device=device, **variant):
            assert verdict.right, f"{shape}: {verdict}"


def test_windows(device):
    """Of fewer queries than keys, any; of more, those that can be told."""
    refused = []
    for window in ((7, 4), (3, -1), (-1, 2), (-1, 21), (50, 60), (0, 0)):
        for shape in ((1, 20, 33, 2, 1, 16, 16), (1, 33, 20, 2, 1, 16, 16)):
            variant = {"causal": False, "window": window}
            reason = OP.implementations["flash_attn"].reason(
                device, cases.inputs(shape, torch.bfloat16, device, **variant)
            )
            if reason is not None:
                refused.append((*window, *shape[1:3]))
                continue
            for verdict in verify(OP, cases, "flash_attn", shape, torch.bfloat16, device=device, **variant):
                assert verdict.right, f"{shape} {window}: {verdict}"
    assert refused == [(3, -1, 33, 20), (-1, 21, 33, 20)]


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), heads_first, fused_projection], ids=lambda f: f.__name__)
@pytest.mark.parametrize("variant", [{}, {"packed": True, "alibi": True}], ids=str)
def test_any_layout(device, layout, variant):
    def change(x):
        return layout(x) if x.is_floating_point() else x

    shape = (2, 19, 22, 4, 2, 24, 24)
    for verdict in verify(OP, cases, "flash_attn", shape, torch.bfloat16, device=device, layout=change, **variant):
        assert verdict.right, verdict


@pytest.mark.parametrize("only", [0, 1])
def test_gradients_that_arrive_at_one_result(device, only):
    for variant in ({}, {"packed": True, "causal": False}):
        for verdict in verify(OP, cases, "flash_attn", SHAPES[3], torch.bfloat16, device=device, only=only, **variant):
            assert verdict.right, verdict


@pytest.mark.parametrize("variant", [{}, {"packed": True}], ids=str)
def test_out(device, variant):
    """out= receives the bits that would have been returned, forward and backward."""
    args = cases.inputs(SHAPES[3], torch.bfloat16, device, **variant)
    y, lse = flash_attn.forward(*args)
    given = torch.full_like(y, math.nan), torch.full_like(lse, math.nan)
    assert flash_attn.forward(*args, out=given) == given and same_bits(given[0], y) and same_bits(given[1], lse)
    call = (torch.ones_like(y), torch.ones_like(lse), y, lse, *args, False)
    expected = flash_attn.backward(*call)[:3]
    into = tuple(torch.full_like(x, math.nan) for x in args[:3])
    flash_attn.backward(*call, out=into)
    assert all(same_bits(found, wanted) for found, wanted in zip(into, expected, strict=True))


def test_a_nan_stays_in_its_row(device):
    args = list(cases.inputs((1, 20, 20, 2, 1, 16, 16), torch.bfloat16, device))
    args[0][0, 5, 1, 3] = math.nan
    y, lse = flash_attn.forward(*args)
    assert y.isnan().any(-1).sum() == lse.isnan().sum() == 1 and y[0, 5, 1].isnan().all() and lse[0, 1, 5].isnan()


def test_public_function(device):
    """By name, packed, under autograd and torch.compile's node."""
    q, k, v, *_, cu_q, cu_k = cases.inputs((1, 50, 50, 4, 2, 32, 32), torch.bfloat16, device, packed=True)[:8]
    options = {"causal": True, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    leaves = [x[0].requires_grad_() for x in (q, k, v)]
    outcomes = []
    for name in ("flash_attn", "reference"):
        with use(attention=name):
            y = llmsys.attention(*leaves, **options)
            outcomes.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


# ---- and refuses what it cannot do ----

SQUARE, MORE_QUERIES = (1, 24, 24, 2, 1, 16, 16), (1, 24, 20, 1, 1, 8, 8)
REFUSED = [
    ("has no bias", SQUARE, {"bias": "full"}),
    ("has no bias", SQUARE, {"bias": "padding", "causal": False}),
    ("has no sinks", SQUARE, {"sinks": True}),
    ("has no block_mask", SQUARE, {"block_mask": True}),
    ("drops by random numbers of its own", SQUARE, {"dropout_p": 0.3}),
    ("given scale -0.4", SQUARE, {"scale": -0.4}),
    ("given scale 0.0", SQUARE, {"scale": 0.0}),
    ("one head dim, given D=16 and E=8", (*SQUARE[:-1], 8), {}),
    ("multiples of 8, given 20", (*SQUARE[:-2], 20, 20), {}),
    (
        "cuts window (3, -1) short for 24 queries of 20 keys",
        (1, 24, 20, 1, 1, 8, 8),
        {"causal": False, "window": (3, -1)},
    ),
    ("cuts window (-1, 21) short", (1, 24, 20, 1, 1, 8, 8), {"causal": False, "window": (-1, 21)}),
]


@pytest.mark.parametrize(("reason", "shape", "variant"), REFUSED, ids=str)
def test_refused(device, reason, shape, variant):
    args = cases.inputs(shape, torch.bfloat16, device, **variant)
    with use(attention="flash_attn"), pytest.raises(RuntimeError, match=re.escape(reason)):
        OP(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_refused_dtypes(device, dtype):
    args = cases.inputs(SQUARE, dtype, device)
    assert OP.implementations["flash_attn"].reason(device, args) == f"flash-attn has no kernel for {dtype}"


def test_every_variant_of_the_op_is_answered_or_refused():
    """So that a new one is thought about here."""
    for variant in cases.VARIANTS:
        args = cases.inputs(SQUARE, torch.bfloat16, **variant)
        refused = flash_attn.inexpressible(Arguments(*args)) is not None
        named = {"bias", "sinks", "block_mask", "dropout_p"} & set(variant) or variant.get("scale", 1) <= 0
        assert refused == bool(named), variant


@pytest.mark.parametrize(
    ("release", "capability", "hip", "reason"),
    [
        (None, (9, 0), None, "flash-attn is not installed"),
        ((2, 6), (9, 0), None, "flash-attn is 2.6, expected 2.7 or later"),
        ((2, 8), (7, 5), None, "flash-attn needs compute capability 8.0, this GPU has 7.5"),
        ((2, 8), (9, 4), "6.4", "flash-attn is known on NVIDIA's GPUs only"),
        ((2, 8), (9, 0), None, None),
    ],
)
def test_machines(monkeypatch, release, capability, hip, reason):
    monkeypatch.setattr(env, "release", lambda distribution: {"flash-attn": release}[distribution])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert flash_attn.why_not(*cases.inputs(SQUARE, torch.bfloat16)) == reason


def test_is_listed_and_runs_only_where_it_is_asked_for():
    q = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16)
    explained = llmsys.explain("attention", q, q, q)
    assert explained.reasons["flash_attn"] == "runs on cuda tensors, given cpu" and explained.chosen == "cpu"
    assert list(OP.implementations).index("flash_attn") > list(OP.implementations).index("reference")
