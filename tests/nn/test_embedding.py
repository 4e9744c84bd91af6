import pytest
import torch

from llmsys.nn import Embedding


def test_is_a_drop_in_for_torchs():
    torch.manual_seed(0)
    theirs = torch.nn.Embedding(11, 6, padding_idx=3)
    torch.manual_seed(0)
    ours = Embedding(11, 6, padding_idx=3)
    assert isinstance(ours, torch.nn.Embedding) and torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[1, 3, 10], [10, 0, 3]])
    for module in (ours, theirs):
        module(ids).square().sum().backward()
    assert torch.equal(ours(ids), theirs(ids))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_from_pretrained():
    weight = torch.randn(4, 3)
    module = Embedding.from_pretrained(weight)
    assert type(module) is Embedding and not module.weight.requires_grad
    assert torch.equal(module(torch.tensor([2, 0])), weight[[2, 0]])


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_errors(option):
    with pytest.raises(ValueError, match=rf"llmsys.nn.Embedding: {next(iter(option))} is .*, expected it left out"):
        Embedding(4, 3, **option)
