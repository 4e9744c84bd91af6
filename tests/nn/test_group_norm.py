import pytest
import torch

from llmsys.nn import GroupNorm


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 1e-2}], ids=str)
def test_is_a_drop_in_for_torchs(options):
    torch.manual_seed(0)
    theirs, ours = torch.nn.GroupNorm(4, 24, **options), GroupNorm(4, 24, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.GroupNorm) and repr(ours) == repr(theirs)
    x = torch.randn(3, 24, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
