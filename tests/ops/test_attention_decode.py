import pytest
import torch

from llmsys import attention, attention_decode
from llmsys.ops._op import use
from llmsys.ops._verify import run
from llmsys.ops.attention_decode import OP, cases
from tests import harness
from tests.harness import checks, same_bits
from tests.ops.list_ops import every_runner

SURFACE = {
    "attention_decode": "(q, k_cache, v_cache, *, cache_seqlens, block_table=None, k_scale=None, v_scale=None, "
    "causal=True, scale=None, window=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None, return_lse=False)"
}
SHAPE = (5, 3, 40, 6, 2, 8, 5)

runner = every_runner(OP)
dtypes = pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def decode(args, **options):
    """The public function, on the tensors that the op takes."""
    names = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "k_scale", "v_scale")
    return attention_decode(**dict(zip(names, args, strict=False)), **options, return_lse=True)


# ---- every implementation ----


@dtypes
@pytest.mark.parametrize("int8", [False, True])
def test_paged_has_the_bits_of_contiguous(runner, dtype, int8):
    shape = (2, 2, 40, 4, 2, 16, 16) if runner.slow else (3, 2, 700, 6, 2, 33, 64)
    if runner.implementation == "reference":
        pytest.skip("PyTorch promises less")
    whole, *paged = (
        dict(
            run(
                OP,
                runner.implementation,
                cases.inputs(shape, dtype, runner.device, block_size=size, int8=int8),
                0,
                dtype,
            )
        )
        for size in ((0, 16) if runner.slow else (0, 1, 7, 16, 64, 1000))
    )
    for result in paged:
        for name, expected in whole.items():
            assert same_bits(result[name], expected), name


@dtypes
def test_a_sequence_has_the_bits_it_has_alone(runner, dtype):
    if runner.implementation == "reference":
        pytest.skip("PyTorch promises less")
    shape = (2, 1, 40, 4, 2, 16, 16) if runner.slow else (5, 2, 700, 6, 2, 64, 64)
    args = cases.inputs(shape, dtype, runner.device)
    with use(attention_decode=runner.implementation):
        y, lse = OP(*args)
        for b in range(shape[0]):
            alone = [arg[b : b + 1] if i < 4 else arg for i, arg in enumerate(args)]
            for together, single in zip((y, lse), OP(*alone), strict=True):
                assert same_bits(together[b : b + 1], single)


@dtypes
def test_a_sequence_of_nothing(runner, dtype):
    args = list(cases.inputs((1, 2, 9, 2, 1, 16, 8), dtype, runner.device))
    args[3] = args[3] * 0
    with use(attention_decode=runner.implementation):
        y, lse = OP(*args)
    assert (y == 0).all() and (lse == -torch.inf).all()


@dtypes
def test_more_tokens_than_keys(runner, dtype):
    """The first of three tokens of a sequence of two: before its start."""
    args = list(cases.inputs((1, 3, 9, 2, 1, 16, 8), dtype, runner.device))
    args[3] = args[3] * 0 + 2
    with use(attention_decode=runner.implementation):
        y, lse = OP(*args)
    assert (y[:, 0] == 0).all() and (lse[..., 0] == -torch.inf).all()
    torch.testing.assert_close(y[0, 1], args[2][0, 0].expand(2, -1))  # the second sees one key


@dtypes
def test_special_values(runner, dtype):
    """NaN and infinity of a key and of a value come out where the reference has them, and in their sequence alone."""
    for value in (float("nan"), float("inf")):
        for which in (1, 2):
            args = list(cases.inputs((2, 1, 30, 4, 2, 16, 16), dtype, runner.device))
            args[which][0, 3, 1] = value
            found, expected = (
                dict(run(OP, name, tuple(args), 0, dtype)) for name in (runner.implementation, "reference")
            )
            for name, result in found.items():
                assert torch.equal(result.isnan(), expected[name].isnan()), name
                assert torch.equal(result.isinf(), expected[name].isinf()), name
                assert result[1].isfinite().all()


@dtypes
def test_special_values_with_int8(runner, dtype):
    """As `append_kv` leaves them, a scale that is NaN or infinite and codes 0; and in a query."""
    for value in (float("nan"), float("inf")):
        for which in (0, 5, 6):
            args = list(cases.inputs((2, 1, 30, 4, 2, 16, 16), dtype, runner.device, int8=True))
            if which == 0:
                args[0][0, 0, 1, 3] = value
            else:
                args[which][0, 3, 1] = value
                args[which - 4][0, 3, 1] = 0
            found, expected = (
                dict(run(OP, name, tuple(args), 0, dtype)) for name in (runner.implementation, "reference")
            )
            for name, result in found.items():
                assert torch.equal(result.isnan(), expected[name].isnan()), (name, value, which)
                assert torch.equal(result.isinf(), expected[name].isinf()), (name, value, which)
                assert result[1].isfinite().all()


def test_places_outside_are_errors(runner):
    if runner.device != "cpu":
        pytest.skip("a GPU is not asked what it holds")
    args = cases.inputs(SHAPE, torch.float32, block_size=8)
    table = args[4].clone()
    table[1, 2] = 99
    with use(attention_decode=runner.implementation):
        for lengths in ([41, 0, 0, 0, 0], [0, 0, -1, 0, 0]):
            with pytest.raises(
                ValueError, match=r"cache_seqlens is \[.*\], expected numbers from 0 to 40, as the cache"
            ):
                OP(*args[:3], torch.tensor(lengths, dtype=torch.int32), *args[4:])
        with pytest.raises(
            ValueError, match=r"block_table\[1, 2\] is 99, expected a block from 0 to 25, as it holds tok"
        ):
            OP(*args[:4], table, *args[5:])


# ---- once: it is attention of each sequence ----


@pytest.mark.parametrize("block_size", [0, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": False},
        {"causal": True, "window": (9, 2)},
        {"causal": False, "window": (9, 1)},
        {"causal": True, "softcap": 1.5, "scale": 2.0},
        {"causal": True, "alibi_slopes": torch.rand(5, 6), "sinks": torch.rand(6).double()},
        {"causal": False, "alibi_slopes": torch.rand(6)},
    ],
    ids=lambda options: "-".join(options),
)
def test_is_attention_of_each_sequence_alone(options, block_size):
    q, k, v, cache_seqlens, *_ = cases.inputs(SHAPE, torch.float64)
    options = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    y, lse = decode(cases.inputs(SHAPE, torch.float64, block_size=block_size)[:5], **options)
    for b, length in enumerate(cache_seqlens.tolist()):
        slopes = options.get("alibi_slopes")
        expected = attention(
            *(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]),
            **options | {"alibi_slopes": slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1]},
            return_lse=True,
        )
        torch.testing.assert_close((y[b : b + 1], lse[b : b + 1]), expected, rtol=1e-12, atol=1e-12)


def test_int8_is_its_dequantised_cache():
    q, k, v, cache_seqlens, _, k_scale, v_scale, *_ = cases.inputs(SHAPE, torch.float64, int8=True)
    found = decode((q, k, v, cache_seqlens, None, k_scale, v_scale))
    expected = decode((q, k * k_scale.unsqueeze(-1), v * v_scale.unsqueeze(-1), cache_seqlens))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_cost():
    args = cases.inputs((2, 1, 10, 4, 2, 8, 6), torch.bfloat16)  # of 10 keys and of 5
    assert cases.traffic("forward", *args) == 15 * 2 * (8 + 6) * 2 + 2 * 4 * (8 + 6) * 2
    assert cases.flops("forward", *args) == 2 * 15 * 4 * (8 + 6)
    int8 = cases.inputs((2, 1, 10, 4, 2, 8, 6), torch.bfloat16, int8=True)
    assert cases.traffic("forward", *int8) == 15 * 2 * (8 + 6 + 8) + 2 * 4 * (8 + 6) * 2


Q, CACHE = torch.ones(2, 1, 4, 8), torch.ones(2, 6, 2, 8)
LENGTHS, SCALE = torch.tensor([3, 6], dtype=torch.int32), torch.ones(2, 6, 2)
FITTING = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "cache_seqlens": LENGTHS}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": Q.int()}, TypeError, "q is torch.int32, expected float32"),
        ({"q": Q[0]}, ValueError, r"q has shape \(1, 4, 8\), k_cache"),
        ({"q": Q[:, :, :3]}, ValueError, "q has 3 heads and k_cache 2, expected a multiple"),
        ({"q": torch.ones(2, 1, 4, 300)}, ValueError, "head dim D is 300, expected one from 1 to 256"),
        ({"k_cache": CACHE.half()}, TypeError, r"k_cache is torch.float16, expected torch.float32 \(q's\) or int8"),
        (
            {"k_cache": CACHE[..., :7]},
            ValueError,
            r"k_cache has shape \(2, 6, 2, 7\), expected \(B, S_max, K, ·\) endi",
        ),
        ({"v_cache": CACHE[:, :5]}, ValueError, r"k_cache is \(2, 6, 2, 8\) torch.float32 and v_cache \(2, 5, 2, 8\)"),
        ({"k_cache": CACHE[:1], "v_cache": CACHE[:1]}, ValueError, r"k_cache has shape \(1, 6, 2, 8\), .* with B=2"),
        ({"cache_seqlens": LENGTHS.long()}, TypeError, "cache_seqlens is torch.int64, expected torch.int32"),
        ({"cache_seqlens": LENGTHS[:1]}, ValueError, r"cache_seqlens has shape \(1,\), expected \(2,\)"),
        ({"block_table": LENGTHS}, ValueError, r"block_table has shape \(2,\), expected \(2, max_blocks\)"),
        ({"block_table": LENGTHS[:, None].to("meta")}, ValueError, "block_table is on meta, expected cpu"),
        ({"k_scale": SCALE}, ValueError, r"k_scale is \(2, 6, 2\) torch.float32 and the cache torch.float32, expected"),
        (
            {"k_cache": CACHE.to(torch.int8), "v_cache": CACHE.to(torch.int8), "v_scale": SCALE},
            ValueError,
            "k_scale is None and the cache torch.int8, expected scales with an int8 cache",
        ),
        (
            {
                "k_cache": CACHE.to(torch.int8),
                "v_cache": CACHE.to(torch.int8),
                "v_scale": SCALE.half(),
                "k_scale": SCALE,
            },
            TypeError,
            "v_scale is torch.float16, expected torch.float32",
        ),
        ({"window": (-2, 0)}, ValueError, r"window is \(-2, 0\), expected"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected"),
        ({"scale": float("inf")}, ValueError, "scale is inf, expected a finite number"),
        ({"sinks": torch.ones(3)}, ValueError, r"sinks has shape \(3,\) on cpu, expected one of \[\(4,\)\]"),
        ({"alibi_slopes": torch.ones(4).int()}, TypeError, "alibi_slopes is torch.int32, expected torch.float32"),
        ({"q": Q.clone().requires_grad_()}, ValueError, "q requires a gradient, expected none"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match="llmsys.attention_decode: " + message):
        attention_decode(**FITTING | changes)
