import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from llmsys import LinearScaling, Llama3Scaling, NTKScaling, YarnScaling, rope, rope_tables
from llmsys.ops._verify import verify
from llmsys.ops.rope import OP, cases
from tests.harness import DTYPES, checks, fused_projection, heads_first, runners, same_bits

SURFACE = {
    "rope": "(x, cos, sin, *, interleaved=False, out=None)",
    "rope_tables": "(positions, dim, *, base=10000.0, scaling=None, device=None)",
    **dict.fromkeys(("LinearScaling", "NTKScaling", "YarnScaling", "Llama3Scaling")),
}

interleaved = SimpleNamespace(**{**vars(cases), "inputs": partial(cases.inputs, interleaved=True)})
by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("check", checks(OP, interleaved), ids=str)
def test_op_interleaved(check):
    check()


# ---- the formula, by hand ----


@pytest.mark.parametrize("interleaved, pairs", [(False, ((0, 2), (1, 3))), (True, ((0, 1), (2, 3)))])
def test_formula(interleaved, pairs):
    """Two tokens of one head of five elements, of which four rotate, one number at a time."""
    x = torch.arange(1.0, 11.0).view(1, 2, 1, 5)
    expected = x.clone()
    for token in (0, 1):
        for i, (first, second) in enumerate(pairs):
            angle = (token + 3) * 100.0 ** (-2 * i / 4)
            a, b = x[0, token, 0, first].item(), x[0, token, 0, second].item()
            expected[0, token, 0, first] = a * math.cos(angle) - b * math.sin(angle)
            expected[0, token, 0, second] = a * math.sin(angle) + b * math.cos(angle)
    cos, sin = rope_tables(torch.tensor([3, 4]), 4, base=100.0)
    torch.testing.assert_close(rope(x, cos, sin, interleaved=interleaved), expected, rtol=1e-6, atol=1e-6)


def test_scores_depend_on_distance_alone():
    """What rotary positions are for: q · k is the same for every pair of tokens as far apart."""
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64).expand(2, 1, 9, 1, 64)
    cos, sin = rope_tables(9, 64)
    for interleaved in (False, True):
        q_KT, k_KT = (rope(x, cos, sin, interleaved=interleaved)[0, :, 0].T for x in (q, k))
        scores = q_KT.T @ k_KT
        torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-6, atol=1e-5)


@by_runner
def test_half_rotates_as_interleaved_does(runner):
    """The two layouts are one op on elements in another order."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    x, cos, sin, _ = cases.inputs((2, 3, 2, 48), torch.float32, runner.device)
    order = torch.arange(48, device=runner.device).view(2, 24).T.flatten()
    forward = OP.implementations[runner.implementation].forward
    with runner.selected():
        halves = forward(x, cos, sin, False)[..., order]
        torch.testing.assert_close(halves, forward(x[..., order].contiguous(), cos, sin, True))


# ---- layouts that attention has ----


def token_of_tables(tensor: torch.Tensor) -> torch.Tensor:
    """Tables of which every second row is used; x as it is."""
    return tensor if tensor.dim() == 4 else tensor.repeat_interleave(2, -2)[..., ::2, :]


@by_runner
@pytest.mark.parametrize("layout", [heads_first, fused_projection, token_of_tables])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout(runner, layout, dtype):
    if runner.why_not:
        pytest.skip(runner.why_not)
    options = {"device": runner.device, "layout": layout}
    with runner.selected():
        for variant in ({}, {"interleaved": True}, {"per_sequence": True, "rotary_fraction": 0.5}):
            for shape in ((2, 3, 4, 33), (1, 5, 2, 64)):
                for verdict in verify(OP, cases, runner.implementation, shape, dtype, **options, **variant):
                    assert verdict.right, f"{shape} {variant}: {verdict}"


def test_heads_are_read_where_they_are():
    """No copy of a strided x: the kernel takes its strides."""
    from llmsys.ops.rope.native import with_whole_rows

    x = torch.randn(2, 3, 4, 16)
    for view in (heads_first(x), fused_projection(x), x[:, ::2], x[..., :8], x[:, :1].expand(2, 3, 4, 16)):
        assert with_whole_rows(view) is view
    assert with_whole_rows(x.transpose(1, 3)).is_contiguous()


@by_runner
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(runner, interleaved, dtype):
    if runner.why_not:
        pytest.skip(runner.why_not)
    forward = OP.implementations[runner.implementation].forward
    for head_dim in (7, 33, 128):
        x, cos, sin, _ = cases.inputs((2, 3, 2, head_dim), dtype, runner.device, rotary_fraction=0.75)
        gapped = x.new_full((2, 3, 5, head_dim + 1), 77.0)
        view = gapped[:, :, 1:3, 1:].copy_(x)
        with runner.selected():
            expected = forward(x, cos, sin, interleaved)
            assert forward(x, cos, sin, interleaved, out=x) is x
            forward(view, cos, sin, interleaved, out=view)
        assert same_bits(x, expected) and same_bits(view, expected)
        view.fill_(77.0)
        assert (gapped == 77).all()


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, fraction", [(128, 1.0), (128, 0.5), (96, 0.25)])
def test_large_enough_to_stream(runner, interleaved, head_dim, fraction):
    """Outputs beyond the last cache take another way to memory."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    from llmsys import _C

    tokens = max(64, _C.cpu.last_level_cache_bytes() // (8 * head_dim * 2))
    x, cos, sin, _ = cases.inputs((1, tokens, 8, head_dim), torch.bfloat16, rotary_fraction=fraction)
    forward = OP.implementations["cpu"].forward
    with runner.selected():
        y = forward(x, cos, sin, interleaved)
        for begin in range(0, tokens, tokens // 4):
            piece = slice(begin, begin + 16)
            assert same_bits(y[:, piece], forward(x[:, piece], cos[piece], sin[piece], interleaved))


# ---- gradient ----


def test_backward_rotates_back():
    x, cos, sin, _ = cases.inputs((2, 3, 2, 16), torch.float64)
    x.requires_grad_()
    y = rope(x, cos, sin)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(dx, x.detach(), rtol=1e-6, atol=1e-6)


def test_gradient_keeps_the_tables_alone():
    x = torch.randn(2, 3, 2, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor):
        rope(x, *rope_tables(3, 16))
    assert kept == [(3, 8), (3, 8)]


def test_tables_that_require_a_gradient():
    x, cos, sin = torch.randn(1, 3, 2, 8), *(table.requires_grad_() for table in rope_tables(3, 8))
    with pytest.raises(ValueError, match=r"llmsys.rope: cos requires a gradient, expected one that does not.*detach"):
        rope(x, cos, sin)
    with pytest.raises(ValueError, match="sin requires a gradient"):
        rope(x, cos.detach(), sin)
    with torch.no_grad():
        rope(x, cos, sin)


# ---- errors ----


def arguments(**changed) -> tuple:
    cos, sin = rope_tables(3, 8)
    return tuple({"x": torch.randn(2, 3, 4, 8), "cos": cos, "sin": sin, **changed}.values())


ERRORS = {
    "integer_x": ({"x": torch.ones(2, 3, 4, 8, dtype=torch.int64)}, TypeError, "x is torch.int64, expected float32"),
    "three_dimensions": ({"x": torch.ones(3, 4, 8)}, ValueError, r"x has shape \(3, 4, 8\), expected \(B, T, H, K\)"),
    "integer_cos": ({"cos": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "cos is torch.int32, expected"),
    "double_sin": ({"sin": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "sin is torch.float64, expected"),
    "half_tables": ({"cos": torch.ones(3, 4).half()}, TypeError, "cos is torch.float16, expected torch.float32"),
    "device": ({"sin": torch.ones(3, 4, device="meta")}, ValueError, "sin is on meta and x on cpu, expected one"),
    "two_shapes": ({"sin": torch.ones(3, 2)}, ValueError, r"cos has shape \(3, 4\) and sin \(3, 2\), expected one"),
    "too_few_tokens": ({"x": torch.ones(2, 4, 4, 8)}, ValueError, r"expected \(4, R/2\) or \(2, 4, R/2\)"),
    "too_many_tokens": ({"x": torch.ones(2, 2, 4, 8)}, ValueError, r"expected \(2, R/2\) or \(2, 2, R/2\)"),
    "other_batch": ({"cos": torch.ones(3, 3, 4), "sin": torch.ones(3, 3, 4)}, ValueError, r"\(3, 3, 4\) and x"),
    "one_dimension": ({"cos": torch.ones(4), "sin": torch.ones(4)}, ValueError, r"cos and sin have shape \(4,\)"),
    "too_wide": ({"cos": torch.ones(3, 8), "sin": torch.ones(3, 8)}, ValueError, "8 columns .* expected at most 4"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    changed, error, message = ERRORS[name]
    with pytest.raises(error, match="llmsys.rope: .*" + message):
        rope(*arguments(**changed))


def test_errors_of_out():
    x, cos, sin = arguments()
    for out in (torch.empty(2, 3, 4, 9), torch.empty(2, 3, 4, 8).half(), torch.empty(2, 4, 3, 8).transpose(1, 2)):
        with pytest.raises(ValueError, match="llmsys.rope: out is .* expected contiguous"):
            rope(x, cos, sin, out=out)
    with pytest.raises(ValueError, match="out= given while a gradient is recorded"):
        rope(x.requires_grad_(), cos, sin, out=torch.empty_like(x))


# ---- tables ----


def test_tables_are_rounded_once():
    """Right to the last bit far out, where angles in float32 are off by thousandths."""
    positions, base = torch.tensor([[0, 1, 131_071], [5, 77, 1_000_003]]), 500_000.0
    cos, sin = rope_tables(positions, 6, base=base)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (2, 3, 3)
    for place in ((b, t, i) for b in range(2) for t in range(3) for i in range(3)):
        angle = positions[place[:2]].item() * base ** (-2 * place[2] / 6)
        assert cos[place] == torch.tensor(math.cos(angle), dtype=torch.float64).float()
        assert sin[place] == torch.tensor(math.sin(angle), dtype=torch.float64).float()


def test_tables_of_a_number_of_positions():
    for by_number, by_position in zip(rope_tables(5, 8), rope_tables(torch.arange(5), 8), strict=True):
        assert same_bits(by_number, by_position)
    assert rope_tables(0, 8)[0].shape == (0, 4) and rope_tables(3, 0)[0].shape == (3, 0)
    assert rope_tables(3, 8, device="meta")[0].device.type == "meta"


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((4, 7), {}, "dim is 7, expected an even number"),
        ((4, -2), {}, "dim is -2, expected an even number"),
        ((-1, 8), {}, "positions is -1, expected a number >= 0"),
        ((4, 8), {"base": 0.0}, "base is 0.0, expected a number above 0"),
        ((4, 8), {"base": math.nan}, "base is nan, expected a number above 0"),
    ],
)
def test_errors_of_tables(arguments, options, message):
    with pytest.raises(ValueError, match="llmsys.rope_tables: " + message):
        rope_tables(*arguments, **options)


def test_compiles_with_its_tables():
    """What a model does: tables from positions, then the rotation, in one graph."""

    def rotated(x, positions):
        return rope(x, *rope_tables(positions, 8), interleaved=True)

    x, positions = torch.randn(2, 3, 4, 8), torch.tensor([[4, 5, 6], [0, 1, 2]])
    compiled = torch.compile(rotated, fullgraph=True)
    torch.testing.assert_close(compiled(x, positions), rotated(x, positions), rtol=1e-6, atol=1e-6)


# ---- more tokens than in training ----

YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
# A scaling, and how Hugging Face transformers writes it (with the sequence length that `dynamic` needs).
SCALINGS = {
    "linear": (LinearScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}, None),
    "dynamic": (
        NTKScaling.dynamic(2.0, num_tokens=20_000, original_max_tokens=8192),
        {"rope_type": "dynamic", "factor": 2.0},
        20_000,
    ),
    "dynamic_short": (
        NTKScaling.dynamic(2.0, num_tokens=100, original_max_tokens=8192),
        {"rope_type": "dynamic", "factor": 2.0},
        100,
    ),
    "yarn": (YarnScaling(factor=16.0, original_max_tokens=4096), YARN, None),
    "yarn_untruncated": (
        YarnScaling(factor=16.0, original_max_tokens=4096, beta_fast=20.0, beta_slow=2.0, truncate=False),
        YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
        None,
    ),
    "yarn_attention": (
        YarnScaling(factor=16.0, original_max_tokens=4096, attention_factor=1.5),
        YARN | {"attention_factor": 1.5},
        None,
    ),
    "llama3": (Llama3Scaling(factor=8.0, original_max_tokens=8192), LLAMA3, None),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dim, base", [(64, 10_000.0), (128, 500_000.0)])
def test_scaling_is_transformers(name, dim, base):
    """To the rounding of transformers' float32."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling, parameters, num_tokens = SCALINGS[name]
    config = LlamaConfig(head_dim=dim, max_position_embeddings=8192, rope_parameters=parameters | {"rope_theta": base})
    function = utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequencies, attention = function(config, torch.device("cpu"), seq_len=num_tokens)
    torch.testing.assert_close(scaling.frequencies(dim, base).float(), frequencies, rtol=1e-5, atol=0)
    assert scaling.attention == pytest.approx(attention)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_with_a_scaling(name):
    scaling = SCALINGS[name][0]
    positions = torch.tensor([0, 3, 70_000])
    cos, sin = rope_tables(positions, 64, base=500_000.0, scaling=scaling)
    angles = positions.double()[:, None] * scaling.frequencies(64, 500_000.0)
    torch.testing.assert_close(cos.double(), scaling.attention * angles.cos(), rtol=0, atol=2**-23)
    torch.testing.assert_close(sin.double(), scaling.attention * angles.sin(), rtol=0, atol=2**-23)


def test_scaling_by_hand():
    """What each promises of its fastest and its slowest pair."""
    plain = [1.0, 10_000.0 ** (-126 / 128)]
    for scaling, slowest in (
        (LinearScaling(factor=4.0), plain[1] / 4),
        (NTKScaling(factor=4.0), plain[1] / 4),
        (YarnScaling(factor=4.0, original_max_tokens=2048), plain[1] / 4),
        (Llama3Scaling(factor=4.0, original_max_tokens=2048), plain[1] / 4),
    ):
        frequencies = scaling.frequencies(128, 10_000.0)
        fastest = plain[0] / 4 if isinstance(scaling, LinearScaling) else plain[0]
        assert frequencies[[0, -1]].tolist() == pytest.approx([fastest, slowest])
        assert (frequencies.diff() < 0).all()
    assert YarnScaling(factor=0.5, original_max_tokens=64).attention == 1.0
    assert YarnScaling(factor=math.e, original_max_tokens=64).attention == pytest.approx(1.1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LinearScaling(factor=0.0), "LinearScaling: factor is 0.0, expected a number above 0"),
        (lambda: NTKScaling(factor=math.nan), "NTKScaling: factor is nan, expected a number above 0"),
        (lambda: NTKScaling(factor=2.0).frequencies(2, 1e4), "NTKScaling: dim is 2, expected at least 4"),
        (
            lambda: YarnScaling(factor=2.0, original_max_tokens=-1),
            "YarnScaling: original_max_tokens is -1, expected a number above 0",
        ),
        (
            lambda: YarnScaling(factor=2.0, original_max_tokens=64, beta_fast=0.5),
            "YarnScaling: beta_fast is 0.5 and beta_slow 1.0, expected beta_fast >= beta_slow",
        ),
        (
            lambda: Llama3Scaling(factor=2.0, original_max_tokens=64, low_freq_factor=4.0),
            "Llama3Scaling: high_freq_factor is 4.0 and low_freq_factor 4.0, expected high_freq_factor > low",
        ),
    ],
)
def test_errors_of_scaling(make, message):
    with pytest.raises(ValueError, match="llmsys." + message):
        make()
