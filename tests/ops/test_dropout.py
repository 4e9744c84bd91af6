import pytest
import torch

from llmsys import dropout
from llmsys.ops._op import use
from llmsys.ops._philox import philox, random_words
from llmsys.ops.dropout import OP, cases
from tests.harness import DTYPES, checks, runners, same_bits

SURFACE = {"dropout": "(x, p=0.5, *, seed, offset=0, out=None)"}

by_runner = pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)

# Counter, key, words: the vectors "philox4x32 10" of kat_vectors in Random123, Salmon et al.'s own code.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


# ---- the words ----


@pytest.mark.parametrize("counter, key, words", KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox(tuple(torch.tensor(word) for word in counter), key)) == words


def called(runner, x, p, seed, offset=0):
    if runner.why_not:
        pytest.skip(runner.why_not)
    with runner.selected(), use(dropout=runner.implementation):
        return dropout(x, p, seed=seed, offset=offset)


@by_runner
@pytest.mark.parametrize("seed", [0, -1, 2**63 + 12345, 1])
@pytest.mark.parametrize("offset", [0, 2**34 - 12, 2**62 + 3])
def test_words_are_philoxs(runner, seed, offset):
    """The word of each element to its last bit: as the least one that is kept, it is; with p a step higher, not."""
    x, words = torch.ones(40, device=runner.device), random_words(seed, offset, 4).tolist()
    if (seed, offset) == (0, 0):
        assert tuple(words) == KNOWN[0][2]
    for i, word in enumerate(words):
        assert called(runner, x, word / 2**32, seed, offset)[i] != 0
        assert called(runner, x, (word + 1) / 2**32, seed, offset)[i] == 0


@by_runner
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_references(runner, dtype):
    """Over vectors, tails, run boundaries, strides, and pieces that start anywhere."""
    x = torch.randn(9, 1101, generator=torch.Generator().manual_seed(0)).to(runner.device, dtype)
    reference = OP.implementations["reference"].forward
    for given in (x, x[:, :1000], x[::2, 1:], x.t(), x[:0]):
        for offset in (0, 1, 6, 2**34 - 4091):
            y = called(runner, given, 0.37, 11, offset)
            assert same_bits(y.cpu(), reference(given.cpu(), 0.37, 11, offset))


@by_runner
@pytest.mark.parametrize("p", [1.0, 1 - 2**-40])
def test_everything_is_dropped(runner, p):
    """Where no word is as large as p · 2³²; into a result that exists, too."""
    x = torch.full((5, 7), float("nan"), device=runner.device)
    assert (called(runner, x, p, 3) == 0).all()
    assert (OP.implementations[runner.implementation].forward(x, p, 3, 0, out=torch.ones_like(x)) == 0).all()


@by_runner
def test_a_piece_takes_its_own_words(runner):
    x = torch.randn(3001, device=runner.device)
    whole = called(runner, x, 0.5, 7, 100)
    for begin in (0, 4, 1234, 2999):
        assert same_bits(called(runner, x[begin:], 0.5, 7, 100 + begin), whole[begin:])


@pytest.mark.parametrize("runner", [r for r in runners(OP) if r.implementation == "cpu"], ids=lambda r: r.name)
def test_large_enough_to_stream(runner):
    """Outputs beyond the last cache take another way to memory."""
    from llmsys import _C

    rows = max(64, _C.cpu.last_level_cache_bytes() // 4096)
    x = torch.randn(rows, 2048).bfloat16()
    y = called(runner, x, 0.1, 3)
    for row in range(0, rows, rows // 4):
        assert same_bits(y[row], OP.implementations["reference"].forward(x[row], 0.1, 3, row * 2048))


# ---- what is dropped ----


def test_drops_with_probability_p():
    """Within five standard deviations, also where neighbours, rows and seeds are compared."""
    n = 2**18
    for p in (0.1, 0.5, 0.9):
        dropped = dropout(torch.ones(n), p, seed=5) == 0
        for pair in (dropped, dropped[1:] ^ dropped[:-1], dropped ^ (dropout(torch.ones(n), p, seed=6) == 0)):
            expected = p if pair is dropped else 2 * p * (1 - p)
            deviation = (expected * (1 - expected) / n) ** 0.5
            assert abs(pair.double().mean().item() - expected) < 5 * deviation * (1 if pair is dropped else 2)


def test_the_gradient_is_dropped_alike_and_nothing_is_kept():
    x = torch.randn(5, 33, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
        y = dropout(x, 0.4, seed=9)
    assert not kept
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert same_bits(dx, dropout(torch.ones_like(x), 0.4, seed=9))


def test_a_dropped_nan_is_zero():
    y = dropout(torch.full((1000,), float("nan")), 0.5, seed=1)
    assert (y == 0).any() and y.isnan().any()
    assert (dropout(torch.full((7,), float("inf")), 1.0, seed=1) == 0).all()


# ---- errors ----


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"p": 1.5}, ValueError, r"p is 1.5, expected a probability in \[0, 1\]"),
        ({"p": float("nan")}, ValueError, "p is nan, expected a probability"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616, expected an integer in"),
        ({"offset": -4}, ValueError, "offset is -4 for 24 elements, expected 0 <= offset"),
        ({"offset": 2**63}, ValueError, "offset is 9223372036854775808 for 24 elements"),
        ({"x": torch.ones(0, 4), "offset": 2**63}, ValueError, "offset is 9223372036854775808 for 0 elements"),
        ({"x": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "x is torch.int32, expected one of float32"),
        ({"x": torch.ones(())}, ValueError, "x has no dimension"),
        ({"out": torch.empty(8, 3)}, ValueError, r"out is \(8, 3\) .* expected contiguous \(3, 8\)"),
    ],
)
def test_error(changed, error, message):
    arguments = {"x": torch.ones(3, 8), "p": 0.5, "seed": 0, **changed}
    with pytest.raises(error, match="llmsys.dropout: .*" + message):
        dropout(**arguments)
