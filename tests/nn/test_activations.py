import pytest
import torch

from llmsys.nn import GELU, SiLU


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(GELU(), torch.nn.GELU()), (GELU("tanh"), torch.nn.GELU("tanh")), (SiLU(), torch.nn.SiLU())],
    ids=str,
)
def test_is_a_drop_in_for_torchs(ours, theirs):
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))
