import math
from unittest import mock

import pytest
import torch

from llmsys import append_kv, rope, rope_tables
from llmsys.ops._op import use
from llmsys.ops._verify import verify
from llmsys.ops.append_kv import OP, cases
from llmsys.ops.append_kv.reference import quantise
from llmsys.ops.attention_decode import cache
from tests import harness
from tests.harness import same_bits
from tests.ops.list_ops import assert_fences_stand, every_runner, fenced

SURFACE = {
    "append_kv": "(k_cache, v_cache, k, v, cache_seqlens, *, block_table=None, k_scale=None, v_scale=None, cos=None, "
    "sin=None, interleaved=False)"
}

runner = every_runner(OP)
dtypes = pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
variants = pytest.mark.parametrize("variant", cases.VARIANTS, ids=str)


def appended(implementation, args, layout=torch.clone):
    """The arguments after the op has run on copies of them."""
    args = [layout(arg.clone()) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with use(append_kv=implementation):
        OP(*args)
    return args


def on_cpu(args):
    """For the reference there, as a GPU divides by 127 in another way."""
    return [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]


def assert_same(first, second):
    for a, b in zip(on_cpu(first), on_cpu(second), strict=True):
        assert not isinstance(a, torch.Tensor) or same_bits(a, b)


def written(args):
    return [args[i] for i in OP.written if args[i] is not None]


# ---- every implementation ----


@dtypes
@variants
def test_accurate(runner, dtype, variant):
    for shape in cases.SMALL[-2 if runner.slow else 0 :]:
        for verdict in verify(OP, cases, runner.implementation, shape, dtype, device=runner.device, **variant):
            assert verdict.right, f"{runner.name} {shape} {dtype} {variant}: {verdict}"


@dtypes
@variants
def test_has_the_bits_of_the_reference(runner, dtype, variant):
    """A copy is a copy, a code is what rounding the quotient gives, and nothing fuses the products of a rotation."""
    for shape in ((3, 4, 12, 2, 33, 20), (2, 1, 5, 3, 128, 256))[runner.slow :]:
        args = cases.inputs(shape, dtype, runner.device, seed=3, **variant)
        assert_same(appended(runner.implementation, args), appended("reference", on_cpu(args)))


@dtypes
def test_copies_any_bits(runner, dtype):
    """Without tables and quantisation, elements are not read as numbers: NaN keeps what it carries."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    args = list(cases.inputs((2, 4, 9, 2, 48, 48), dtype, runner.device))
    bits = torch.iinfo(integer)
    for i in range(2):
        drawn = torch.randint(bits.min, bits.max, args[i].shape, generator=torch.Generator().manual_seed(i))
        args[i] = drawn.to(runner.device, integer).view(dtype)
    assert args[0].isnan().any() or dtype == torch.float32
    assert_same(appended(runner.implementation, args), appended("reference", on_cpu(args)))


@dtypes
@variants
def test_any_layout(runner, dtype, variant):
    args = cases.inputs((3, 4, 12, 2, 34, 16), dtype, runner.device, seed=3, **variant)
    expected = appended(runner.implementation, args)
    for layout in (harness.gapped, harness.transposed, harness.heads_first, fenced):
        assert_same(appended(runner.implementation, args, layout), expected)


@dtypes
def test_one_token_given_for_all(runner, dtype):
    """k, v, lengths and tables that are expanded; and lengths, a table of blocks and angles with steps."""
    args = list(cases.inputs((3, 2, 12, 2, 34, 16), dtype, runner.device, rotary_fraction=1.0, block_size=4))
    args[0], args[1] = (x[:1, :1, :1].expand(x.shape) for x in args[:2])
    args[6] = args[6][:1].expand(3)
    args[8], args[9] = (x[:1].expand(x.shape) for x in args[8:10])
    expected = appended(runner.implementation, args)  # of copies without gaps
    with use(append_kv=runner.implementation):
        OP(*args)
    assert_same(args, expected)
    for cached in written(args):
        cached.zero_()
    for i in (6, 7, 8, 9):
        args[i] = args[i].repeat_interleave(2, -1)[..., ::2]
    with use(append_kv=runner.implementation):
        OP(*args)
    assert_same(args, expected)


@dtypes
@variants
def test_nothing_else_is_written(runner, dtype, variant):
    """What was in the cache, and around it, stays; and so do the arguments that are read."""
    args = list(cases.inputs((3, 4, 12, 2, 34, 16), dtype, runner.device, seed=3, **variant))
    for i in OP.written:
        if args[i] is not None:
            args[i] = fenced(args[i] + 55)
    before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    with use(append_kv=runner.implementation):
        OP(*args)
    lengths, table, size = args[6].tolist(), args[7], before[2].shape[1]
    for i in OP.written:
        if args[i] is None:
            continue
        places = {
            (b, length + t) if table is None else (int(table[b, (length + t) // size]), (length + t) % size)
            for b, length in enumerate(lengths)
            for t in range(4)
        }
        kept = torch.ones(before[i].shape[:2], dtype=torch.bool)
        kept[tuple(zip(*places, strict=True))] = False
        assert same_bits(args[i][kept], before[i][kept]) and kept.sum() == kept.numel() - 12
        assert_fences_stand(args[i])
    read = [i for i in range(len(args)) if i not in OP.written]
    assert_same([args[i] for i in read], [before[i] for i in read])


@dtypes
@pytest.mark.parametrize("int8", [False, True])
def test_neighbours_in_one_buffer_stay(runner, dtype, int8):
    """Keys, something else and values of a token side by side."""
    args = list(cases.inputs((2, 3, 7, 2, 16, 16), dtype, runner.device, rotary_fraction=0.5, int8=int8))
    expected = appended(runner.implementation, args)
    buffer = args[2].new_full((2, 7, 3, 2, 16), 55)
    buffer[:, :, 0] = buffer[:, :, 2] = 0
    args[2], args[3] = buffer[:, :, 0], buffer[:, :, 2]
    with use(append_kv=runner.implementation):
        OP(*args)
    assert_same(args, expected)
    assert (buffer[:, :, 1] == 55).all()


def test_blocks_that_are_not_needed_need_not_be_listed(runner):
    args = list(cases.inputs((3, 3, 20, 2, 8, 8), torch.float32, runner.device, block_size=4))
    args[6] = torch.tensor([0, 7, 12], dtype=torch.int32, device=runner.device)
    expected = appended(runner.implementation, args)
    place, end = args[6].unsqueeze(1), torch.arange(5, device=runner.device) * 4
    unlisted = torch.tensor([[-1], [99], [2**31 - 1]], dtype=torch.int32, device=runner.device)
    args[7] = args[7].where((end + 4 > place) & (end < place + 3), unlisted)
    with use(append_kv=runner.implementation):
        OP(*args)
    assert_same(written(args), written(expected))


@variants
def test_same_bits_again_and_with_other_threads(runner, variant):
    shape = (2, 3, 9, 2, 16, 16) if runner.implementation != "cpu" else (3, 70, 99, 5, 128, 96)
    args = cases.inputs(shape, torch.bfloat16, runner.device, **variant)
    expected, threads = appended(runner.implementation, args), torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            assert_same(appended(runner.implementation, args), expected)
    finally:
        torch.set_num_threads(threads)


@dtypes
def test_special_values_of_int8(runner, dtype):
    """Zeros have scale 0; a row with NaN or infinity has that as its scale; a subnormal row comes back in its range."""
    args = list(cases.inputs((1, 4, 6, 1, 33, 33), dtype, runner.device, int8=True))
    args[0][0, 0] = 0
    args[0][0, 1, 0, 32] = math.nan
    args[0][0, 2, 0, 5] = -math.inf
    args[0][0, 3] = torch.finfo(dtype).smallest_normal / 2
    args[1][0, 0] = 190 * 2.0**-149  # where a scale is that coarse, quotients are beyond 127
    ours, theirs = appended(runner.implementation, args), appended("reference", on_cpu(args))
    assert_same([t.nan_to_num(nan=-1) for t in ours[2:6]], [t.nan_to_num(nan=-1) for t in theirs[2:6]])
    scale, codes = ours[4][0, :4, 0], ours[2][0, :4, 0]
    assert scale[0] == 0 and scale[1].isnan() and scale[2] == math.inf
    assert (codes[:3] == 0).all() and (codes[3] == 127).all()
    assert (ours[3][0, 0] == (127 if dtype == torch.float32 else 0)).all()


@dtypes
def test_rotated_special_values_of_int8(runner, dtype):
    """A row has the scale of what it is once it has turned; other rows have theirs."""
    args = list(cases.inputs((2, 3, 6, 2, 40, 8), dtype, runner.device, int8=True, rotary_fraction=0.5))
    args[0][0, 0, 0, 3] = math.inf
    args[0][0, 1, 1, 39] = math.inf  # does not turn
    args[0][1, 2, 0, 12] = math.nan
    ours, theirs = appended(runner.implementation, args), appended("reference", on_cpu(args))
    assert_same([t.nan_to_num(nan=-1) for t in written(ours)], [t.nan_to_num(nan=-1) for t in written(theirs)])
    assert written(ours)[2].isfinite().sum() == written(ours)[2].numel() - 3


def test_places_outside_are_errors_and_nothing_is_written(runner):
    if runner.device != "cpu":
        pytest.skip("a GPU is not asked what it holds")
    args = list(cases.inputs((2, 3, 8, 1, 4, 4), torch.float32))
    paged = list(cases.inputs((2, 3, 8, 1, 4, 4), torch.float32, block_size=2))
    paged[7] = paged[7].clone()
    paged[6] = torch.tensor([2, 1], dtype=torch.int32)
    paged[7][0, 0] = -1  # before what is written
    paged[7][1, 2:] = 99  # after it
    appended(runner.implementation, paged)
    with use(append_kv=runner.implementation):
        for lengths in ([6, 0], [0, -1]):
            args[6] = torch.tensor(lengths, dtype=torch.int32)
            with pytest.raises(
                ValueError, match=r"cache_seqlens is \[.*\] before 3 more tokens, expected .* from 0 to 5"
            ):
                OP(*args)
        assert not args[2].any() and not args[3].any()
        paged[7][1, 1] = 9
        with pytest.raises(
            ValueError, match=r"block_table\[1, 1\] is 9, expected a block from 0 to 8, as it holds token"
        ):
            OP(*paged)


@pytest.mark.parametrize("block_size", [0, 2])
def test_places_that_nobody_has_checked_are_not_written(runner, block_size):
    """On a GPU, where lengths are not known in advance: tokens inside are written, those outside are skipped."""
    if runner.implementation in ("cpu", "reference"):
        pytest.skip("checks its places")
    args = list(cases.inputs((4, 3, 8, 1, 4, 4), torch.float32, runner.device, block_size=block_size))
    args[2], args[3] = fenced(args[2]), fenced(args[3])
    args[6] = torch.tensor([2, 7, -2, 2**31 - 2], dtype=torch.int32, device=runner.device)
    if block_size:
        args[7] = args[7].clone()
        args[7][0, 1], args[7][1, 3] = -1, len(args[2])
    with use(append_kv=runner.implementation), mock.patch.object(cache, "check_places"):
        OP(*args)
    table = args[7].tolist() if block_size else None
    expected = [torch.zeros_like(cached) for cached in args[2:4]]
    for b, t in torch.cartesian_prod(torch.arange(4), torch.arange(3)).tolist():
        place = int(args[6][b]) + t
        block = (b if table is None else table[b][place // 2]) if 0 <= place < 8 else -1
        if 0 <= block < len(args[2]):
            for x, cached in zip(args[:2], expected, strict=True):
                cached[block, place if table is None else place % 2] = x[b, t]
    assert_same(args[2:4], expected)
    for cached in args[2:4]:
        assert_fences_stand(cached)


# ---- once ----


@pytest.mark.parametrize("int8", [False, True])
def test_float64_runs_the_reference(int8):
    args = cases.inputs((2, 1, 4, 1, 8, 8), torch.float64, int8=int8, rotary_fraction=1.0)
    assert OP.select(*args).name == "reference" and OP.explain(*args).reasons["cpu"] == "no kernel for torch.float64"
    OP(*args)


def test_by_hand():
    k, v = torch.randn(2, 2, 3, 8).bfloat16(), torch.randn(2, 2, 3, 4).bfloat16()
    k_cache, v_cache = torch.zeros(2, 6, 3, 8).bfloat16(), torch.zeros(2, 6, 3, 4).bfloat16()
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    cos, sin = rope_tables(lengths[:, None] + torch.arange(2), 8)
    version = k_cache._version
    assert append_kv(k_cache, v_cache, k, v, lengths, cos=cos, sin=sin, interleaved=True) is None
    turned = rope(k, cos, sin, interleaved=True)
    torch.testing.assert_close(k_cache[0, 3:5], turned[0])
    torch.testing.assert_close(k_cache[1, :2], turned[1])
    assert torch.equal(v_cache[0, 3:5], v[0]) and torch.equal(v_cache[1, :2], v[1])
    assert k_cache[0, :3].abs().sum() == k_cache[0, 5:].abs().sum() == k_cache[1, 2:].abs().sum() == 0
    assert k_cache._version > version


def test_quantise():
    x = torch.tensor([[1.27, -0.635, 0.005], [0.0, 0.0, 0.0]])
    codes, scale = quantise(x)
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0]] or codes.tolist() == [[127, -63, 0], [0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.0]))
    x = torch.randn(100, 64)
    codes, scale = quantise(x)
    assert ((codes * scale[:, None] - x).abs() <= 0.5001 * scale[:, None]).all()
    assert (codes.abs().amax(-1) == 127).all()
    codes, scale = quantise(x[:, :0])
    assert codes.shape == (100, 0) and not scale.any()


@dtypes
def test_opcheck(dtype):
    for variant in cases.VARIANTS:
        torch.library.opcheck(OP.node, cases.inputs((2, 3, 8, 2, 6, 4), dtype, **variant))


def test_compiles():
    args = cases.inputs((2, 3, 8, 2, 6, 4), torch.float32, rotary_fraction=1.0, int8=True)

    def function(k, v, k_cache, v_cache, k_scale, v_scale, lengths, table, cos, sin, interleaved):
        append_kv(k_cache, v_cache, k * 1, v, lengths, k_scale=k_scale, v_scale=v_scale, cos=cos, sin=sin)

    eager, traced = ([arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args] for _ in range(2))
    function(*eager)
    torch.compile(function, fullgraph=True, backend="aot_eager")(*traced)
    assert_same(eager, traced)


def test_cost():
    args = cases.inputs((2, 3, 8, 4, 6, 5), torch.bfloat16, rotary_fraction=1.0)
    assert cases.traffic("forward", *args) == 24 * 11 * 4 and cases.flops("forward", *args) == 24 * 18
    args = cases.inputs((2, 3, 8, 4, 6, 5), torch.bfloat16, int8=True)
    assert cases.traffic("forward", *args) == 24 * (11 * 3 + 8) and cases.flops("forward", *args) == 0


K, CACHE, LENGTHS = torch.ones(2, 1, 3, 8), torch.ones(2, 6, 3, 8), torch.tensor([3, 5], dtype=torch.int32)
FITTING = {"k_cache": CACHE, "v_cache": CACHE, "k": K, "v": K, "cache_seqlens": LENGTHS}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"k": K[0]}, ValueError, r"k is \(1, 3, 8\) torch.float32 on cpu and v \(2, 1, 3, 8\)"),
        ({"v": K.half()}, ValueError, "k is .* and v .* torch.float16 on cpu, expected .* of one dtype"),
        ({"k": K.int(), "v": K.int()}, TypeError, "k is torch.int32, expected float32"),
        ({"k_cache": CACHE.double()}, TypeError, r"k_cache is torch.float64, expected torch.float32 \(k's\) or int8"),
        ({"v_cache": CACHE[..., 1:]}, ValueError, r"v_cache has shape \(2, 6, 3, 7\), expected .* ending in \(3, 8\)"),
        ({"cache_seqlens": LENGTHS.long()}, TypeError, "cache_seqlens is torch.int64"),
        (
            {"k_scale": torch.ones(2, 6, 3)},
            ValueError,
            "k_scale is .* and the cache torch.float32, expected scales with",
        ),
        ({"cos": torch.ones(1, 4)}, ValueError, "sin is None, expected both of cos and sin"),
        ({"cos": torch.ones(1, 5), "sin": torch.ones(1, 5)}, ValueError, "cos and sin have 5 columns and k's heads 8"),
        ({"k_cache": CACHE[:1].expand(2, -1, -1, -1)}, ValueError, r"k_cache has strides \(0, 24, 8, 1\), expected"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match="llmsys.append_kv: " + message):
        append_kv(**FITTING | changes)
