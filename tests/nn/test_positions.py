import math

import pytest
import torch

import llmsys
from llmsys.nn import alibi_slopes, sinusoidal_positions

# The exponents. Press et al. 2021, section 3: 8 heads have 1/2, 1/4, … 1/256, and 16 heads 1/2^0.5, 1/2, … 1/2^8. For
# 12 heads the authors' code has the 8, then every other one of the 16.
PUBLISHED = {
    1: [8],
    2: [4, 8],
    3: [4, 8, 2],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
    16: [0.5 * n for n in range(1, 17)],
}


@pytest.mark.parametrize("num_heads", PUBLISHED)
def test_alibi_slopes(num_heads):
    expected = torch.tensor([2.0**-exponent for exponent in PUBLISHED[num_heads]])
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == torch.float32 and torch.equal(slopes, expected)


def test_alibi_slopes_of_any_number_of_heads():
    for num_heads in range(1, 130):
        slopes = alibi_slopes(num_heads)
        assert slopes.shape == (num_heads,) and slopes.min() >= 2**-8 and slopes.max() < 1
        assert len(slopes.unique()) == num_heads


def test_alibi_slopes_are_what_transformers_has():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for num_heads in (1, 7, 12, 32, 71, 112):
        mask = torch.ones(1, 2)
        theirs = bloom.build_alibi_tensor(mask, num_heads, torch.float32).view(num_heads, 2)[:, 1]
        torch.testing.assert_close(alibi_slopes(num_heads), theirs)


def test_alibi_slopes_fit_attention():
    """The penalty of a key is its distance times the slope: (h, t, s) as the paper's figure 3 has it."""
    q = torch.zeros(1, 4, 8, 8)
    v = torch.eye(4, 8)[None, :, None].expand(-1, -1, 8, -1)
    y = llmsys.attention(q, q, v, causal=True, alibi_slopes=alibi_slopes(8))[0, 3, :, :4]
    penalties = -alibi_slopes(8).unsqueeze(1) * torch.tensor([3.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(y, penalties.softmax(-1))


def test_sinusoidal_positions():
    """The formula of section 3.5, element by element."""
    table = sinusoidal_positions(60, 6)
    assert table.shape == (60, 6) and table.dtype == torch.float32
    for p in (0, 1, 7, 59):
        for i in range(3):
            angle = p / 10_000 ** (2 * i / 6)
            pair = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(table[p, 2 * i : 2 * i + 2], pair, rtol=0, atol=1e-7)
    assert torch.equal(table[0], torch.tensor([0.0, 1, 0, 1, 0, 1]))


def test_sinusoidal_positions_known_values():
    """sin 1 and cos 1, and of a hundredth of it; at position 2 of four dimensions."""
    table = sinusoidal_positions(3, 4)
    expected = [[0, 1, 0, 1], [0.841471, 0.540302, 0.0099998, 0.999950], [0.909297, -0.416147, 0.0199987, 0.999800]]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-6)


def test_sinusoidal_positions_in_halves_are_whispers():
    whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    # Whisper divides by one pair fewer: the last wave has base itself.
    base = 10_000 ** (16 / 15)
    ours = sinusoidal_positions(50, 32, base=base, interleaved=False)
    torch.testing.assert_close(ours, whisper.sinusoids(50, 32), rtol=0, atol=1e-5)


def test_sinusoidal_positions_far_out_and_narrow():
    far = sinusoidal_positions(100_001, 4)
    assert torch.equal(far[:50], sinusoidal_positions(50, 4))
    assert abs(far[100_000, 0].item() - math.sin(100_000)) < 1e-7
    assert torch.equal(sinusoidal_positions(50, 4, dtype=torch.bfloat16), far[:50].bfloat16())
    assert sinusoidal_positions(0, 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("alibi_slopes: num_heads is 0, expected an integer above 0", lambda: alibi_slopes(0)),
        ("sinusoidal_positions: length is -1", lambda: sinusoidal_positions(-1, 4)),
        ("sinusoidal_positions: dim is 5, expected an even", lambda: sinusoidal_positions(3, 5)),
        ("sinusoidal_positions: base is 0, expected", lambda: sinusoidal_positions(3, 4, base=0)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
