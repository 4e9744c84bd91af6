import pytest
import torch

from llmsys.nn import Softmax


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_is_a_drop_in_for_torchs(dim):
    ours, theirs = Softmax(dim), torch.nn.Softmax(dim)
    assert isinstance(ours, torch.nn.Softmax) and repr(ours) == repr(theirs)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))


def test_no_dimension_is_guessed():
    with pytest.raises(ValueError, match="dim is None"):
        Softmax()
