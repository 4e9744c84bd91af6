import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llmsys.nn import Dropout


def test_is_a_drop_in_for_torchs():
    ours = Dropout(0.25)
    assert isinstance(ours, torch.nn.Dropout) and ours.state_dict() == {}
    x = torch.ones(400, 100)
    assert ours.eval()(x) is x
    y = ours.train()(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert Dropout(0.0)(x) is x


def test_torchs_seed_repeats_it():
    drop, x = Dropout(), torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first) and torch.equal(drop(x), second)
    assert not torch.equal(first, second)


def test_recomputation_repeats_it():
    drop, x = Dropout(), torch.ones(64, 64, requires_grad=True)
    y = checkpoint(lambda x: drop(x) * x, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, 2 * y.detach())  # y = mask · x² / (1 - p), at x = 1


def test_runs_compiled():
    drop, x = Dropout(), torch.ones(16, 64)
    torch.manual_seed(0)
    expected = [drop(x) for _ in range(3)]
    torch.manual_seed(0)
    compiled = torch.compile(drop)
    for y in expected:
        assert torch.equal(compiled(x), y)


def test_errors():
    with pytest.raises(ValueError, match="llmsys.nn.Dropout: inplace is True, expected False"):
        Dropout(0.5, inplace=True)
