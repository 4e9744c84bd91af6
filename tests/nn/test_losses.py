import pytest
import torch

from llmsys.nn import CrossEntropyLoss


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 7, 4), (2, 7, 3, 4)])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "ignore_index": 2}, {"label_smoothing": 0.1, "weight": torch.rand(7)}],
    ids=str,
)
def test_is_a_drop_in_for_torchs(shape, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(7, shape[:0] + shape[2:] if len(shape) == 1 else shape[:1] + shape[2:], generator=generator)
    ours, theirs = CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert isinstance(ours, torch.nn.CrossEntropyLoss) and list(ours.state_dict()) == list(theirs.state_dict())
    found = []
    for loss in (ours, theirs):
        x = logits.clone().requires_grad_()
        value = loss(x, target)
        value.sum().backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(*found)


def test_probabilities_are_torchs():
    with pytest.raises(TypeError, match="torch.nn.CrossEntropyLoss takes probabilities"):
        CrossEntropyLoss()(torch.randn(3, 7), torch.rand(3, 7))
