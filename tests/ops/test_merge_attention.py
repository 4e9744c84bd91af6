import itertools

import pytest
import torch

from llmsys import attention, merge_attention, use

SURFACE = {"merge_attention": "(outs, lses)"}


def operands(dtype=torch.float64, keys=23):
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 5, 6, 8), (2, keys, 2, 8), (2, keys, 2, 7)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def parts(q, k, v, sizes):
    """(outs, lses) of attention to runs of `sizes` keys."""
    runs = zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)
    return zip(*(attention(q, k, v, scale=2.0, return_lse=True) for k, v in runs), strict=True)


@pytest.mark.parametrize("sizes", [[23], [10, 13], [1, 0, 20, 2]], ids=str)
def test_parts_give_the_whole_and_its_gradients(sizes):
    whole, split = ([tensor.clone().requires_grad_() for tensor in operands()] for _ in range(2))
    expected = attention(*whole, scale=2.0, return_lse=True)
    found = merge_attention(*parts(*split, sizes))
    generator = torch.Generator().manual_seed(1)
    arriving = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in expected]
    for results in (expected, found):
        torch.autograd.backward(results, arriving)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_in_any_grouping():
    outs, lses = map(list, parts(*operands(), [3, 9, 5, 6]))
    expected = merge_attention(outs, lses)
    for order in itertools.permutations(range(4)):
        first, *rest = ((outs[i], lses[i]) for i in order)
        for part in rest:
            first = merge_attention(*zip(first, part, strict=True))
        torch.testing.assert_close(first, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accurate(dtype):
    """Parts of y are rounded before: one more rounding of each, weighted, is what merging may add."""
    q, k, v = operands(dtype)
    with use(attention="reference"):
        y, lse = merge_attention(*parts(q, k, v, [10, 13]))
        true, true_lse = attention(q.double(), k.double(), v.double(), scale=2.0, return_lse=True)
        same = attention(q, k, v, scale=2.0)
    assert y.dtype == dtype and lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert (y - true).abs().max() <= 2 * (same - true).abs().max() + eps * v.abs().max()
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


def test_extreme_lse():
    out = torch.ones(1, 1, 1, 2)
    for high in (-1e4, 0.0, 3e38):
        y, lse = merge_attention([out, 3 * out], [torch.full((1, 1, 1), high)] * 2)
        assert torch.equal(y, 2 * out) and lse.isfinite().all()


def test_part_that_sees_nothing_weighs_nothing_whatever_it_holds():
    """So too in the gradient, and with no other part."""
    lse = torch.tensor([[[0.5, -torch.inf]]]).requires_grad_()
    nothing = torch.full((1, 1, 2), -torch.inf).requires_grad_()
    out = torch.tensor([[[[2.0]], [[torch.nan]]]]).requires_grad_()
    garbage = torch.full((1, 2, 1, 1), torch.nan).requires_grad_()
    y, merged = merge_attention([out, garbage], [lse, nothing])
    assert y.flatten().tolist() == [2, 0] and merged.flatten().tolist() == [0.5, -torch.inf]
    y.sum().backward(retain_graph=True)
    merged[..., 0].sum().backward()
    assert lse.grad.flatten().tolist() == [1, 0] and out.grad.flatten().tolist() == [1, 0]
    assert nothing.grad.abs().sum() == garbage.grad.abs().sum() == 0


def test_packed():
    outs, lses = map(list, parts(*operands(), [10, 13]))
    y, lse = merge_attention(outs, lses)
    packed = merge_attention([out[1] for out in outs], [part[1] for part in lses])
    torch.testing.assert_close(packed, (y[1], lse[1]), rtol=0, atol=0)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 2, 2, 1, 3, generator=generator, dtype=torch.float64).requires_grad_()
    lses = torch.randn(3, 2, 1, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda outs, lses: merge_attention([*outs], [*lses]), (outs, lses))


def test_compiles():
    outs, lses = map(list, parts(*operands(torch.float32), [10, 13]))
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outs, lses), merge_attention(outs, lses))


@pytest.mark.parametrize(
    "outs, lses, error, message",
    [
        ([], [], ValueError, "0 outs and 0 lses, expected"),
        ([torch.ones(1, 2, 3, 4)], [], ValueError, "1 outs and 0 lses, expected"),
        ([torch.ones(2, 3)], [torch.ones(3)], ValueError, r"outs\[0\] has shape \(2, 3\), expected \(B, T, H, E\)"),
        (
            [torch.ones(1, 2, 3, 4)],
            [torch.ones(1, 2, 3)],
            ValueError,
            r"lses\[0\] has shape \(1, 2, 3\) on cpu, expected \(1, 3, 2\)",
        ),
        ([torch.ones(1, 1, 1, 1)] * 2, [torch.ones(1, 1, 1), torch.ones(1, 1, 1).double()], TypeError, r"lses\[1\] is"),
        ([torch.ones(1, 1, 1, 1).int()], [torch.ones(1, 1, 1)], TypeError, r"outs\[0\] is torch.int32, expected"),
    ],
)
def test_errors(outs, lses, error, message):
    with pytest.raises(error, match="llmsys.merge_attention: " + message):
        merge_attention(outs, lses)
