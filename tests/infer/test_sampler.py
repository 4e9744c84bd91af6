import pytest
import torch

from llmsys.infer import Sampler

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),  # 0.5 / 0.95 + 0.3 / 0.95 reaches 0.8
    ],
)
def test_probabilities(settings, expected):
    probabilities = Sampler(**settings).probabilities(LOGITS)
    torch.testing.assert_close(probabilities[0], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(probabilities[1], probabilities[0].flip(0))


def test_ties_leave_exactly_top_k():
    assert (Sampler(top_k=3).probabilities(torch.zeros(1, 8)) > 0).sum() == 3


def test_draws_follow_the_probabilities_and_the_seed():
    def draw(seed):
        return Sampler()(LOGITS[:1].expand(20_000, 4), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    frequency = draw(1).bincount(minlength=4) / 20_000
    error = (LOGITS[0].exp() * (1 - LOGITS[0].exp()) / 20_000).sqrt()
    assert ((frequency - LOGITS[0].exp()).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan, expected 0 or more"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0, expected more than 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)
