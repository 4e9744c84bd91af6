import pytest
import torch

import llmsys
from llmsys import cross_entropy, cross_entropy_parts, merge_cross_entropy
from llmsys.ops.cross_entropy import cases
from llmsys.ops.cross_entropy.sharded import Parts

SURFACE = {
    "cross_entropy_parts": "(logits, target, first_class, *, ignore_index=-100, softcap=0.0)",
    "merge_cross_entropy": "(shards, target, *, ignore_index=-100, z_loss=0.0)",
}


def merged(logits, target, sizes, softcap=0.0, z_loss=0.0):
    first, shards = 0, []
    for piece in logits.split(sizes, -1):
        shards.append(cross_entropy_parts(piece, target, first, softcap=softcap))
        first += piece.shape[-1]
    return merge_cross_entropy(shards, target, z_loss=z_loss)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "z_loss": 1e-2}], ids=str)
@pytest.mark.parametrize("sizes", [[60], [20, 20, 20], [1, 58, 1]], ids=str)
def test_shards_give_the_whole(sizes, options):
    logits, target, *_ = cases.inputs((3, 11, 60), torch.float64, scale=4.0)
    whole, parts = (logits.clone().requires_grad_() for _ in range(2))
    expected = cross_entropy(whole, target, reduction="none", return_lse=True, **options)
    found = merged(parts, target, sizes, **options)
    incoming = torch.linspace(0.5, 1.5, 33, dtype=torch.float64).view(3, 11)
    for loss, leaf in ((expected, whole), (found, parts)):
        torch.autograd.backward(loss, [incoming, -incoming])
        assert leaf.grad is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-12)


def test_reduced_by_three_reductions():
    """As ranks do it, each with its own parts: maximum, then two sums."""
    logits, target, *_ = cases.inputs((7, 30), torch.float32, scale=10.0)
    parts = [
        cross_entropy_parts(piece, target, first) for first, piece in zip((0, 15), logits.split(15, -1), strict=True)
    ]
    highest = torch.maximum(parts[0].max, parts[1].max)
    total = sum(part.sum * torch.exp(part.max - highest) for part in parts)
    one = Parts(highest, total, parts[0].target + parts[1].target)
    torch.testing.assert_close(merge_cross_entropy([one], target), merge_cross_entropy(parts, target))
    torch.testing.assert_close(
        merge_cross_entropy(parts, target)[0], cross_entropy(logits, target, reduction="none"), rtol=1e-5, atol=1e-5
    )


def test_second_derivative():
    logits, target, *_ = cases.inputs((3, 6), torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda logits: merged(logits, target, [4, 2], softcap=3.0)[0], (logits,))


def test_float32_from_bfloat16():
    logits, target, *_ = cases.inputs((7, 30), torch.bfloat16)
    loss, lse = merged(logits, target, [10, 20])
    assert loss.dtype == lse.dtype == torch.float32
    with llmsys.use(cross_entropy="reference"):
        expected = cross_entropy(logits, target, reduction="none", return_lse=True)
    torch.testing.assert_close((loss, lse), expected)


def test_errors():
    with pytest.raises(ValueError, match=r"llmsys.cross_entropy_parts: logits has shape \(3, 4\) and target \(2,\)"):
        cross_entropy_parts(torch.ones(3, 4), torch.zeros(2, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="llmsys.merge_cross_entropy: no shards given, expected"):
        merge_cross_entropy([], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="llmsys.cross_entropy_parts: first_class is -1, expected a class from 0"):
        cross_entropy_parts(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), -1)
