import torch

from llmsys.nn import RMSNorm


def test_is_a_drop_in_for_torchs():
    torch.manual_seed(0)
    theirs = torch.nn.RMSNorm(24, eps=1e-5)
    torch.nn.init.normal_(theirs.weight)
    ours = RMSNorm(24, eps=1e-5)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.RMSNorm)
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())


def test_with_a_residual_gives_norm_and_sum():
    torch.manual_seed(0)
    norm, x, residual = RMSNorm(16), torch.randn(4, 16), torch.randn(4, 16)
    y, total = norm(x, residual)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, norm(x + residual))


def test_weight_offset_starts_as_the_identity_scale():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    offset = RMSNorm(16, weight_offset=1.0)
    assert offset.weight.abs().max() == 0
    torch.testing.assert_close(offset(x), RMSNorm(16)(x))
    assert "weight_offset=1.0" in repr(offset)
