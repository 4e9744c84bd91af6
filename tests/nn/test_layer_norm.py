import pytest
import torch

from llmsys.nn import LayerNorm


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-2}], ids=str)
def test_is_a_drop_in_for_torchs(options):
    torch.manual_seed(0)
    theirs, ours = torch.nn.LayerNorm(24, **options), LayerNorm(24, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.LayerNorm) and repr(ours) == repr(theirs)
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())


def test_starts_as_torchs():
    for (name, ours), (_, theirs) in zip(
        LayerNorm(8).named_parameters(), torch.nn.LayerNorm(8).named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_with_a_residual_gives_norm_and_sum():
    torch.manual_seed(0)
    norm, x, residual = LayerNorm(16), torch.randn(4, 16), torch.randn(4, 16)
    y, total = norm(x, residual)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, norm(x + residual))


def test_several_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"llmsys.nn.LayerNorm: dim is \(4, 8\), expected the size of one dimension"):
        LayerNorm((4, 8))
