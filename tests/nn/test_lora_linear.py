import copy

import pytest
import torch

from llmsys.nn import Linear, LoRALinear
from tests.harness import same_bits


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    made = LoRALinear(12, 9, 4, bias, alpha=8, dtype=dtype)
    torch.nn.init.normal_(made.lora_b)
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_formula(bias):
    made, x = layer(bias), torch.randn(2, 3, 12)
    expected = torch.nn.functional.linear(x, made.weight, made.bias) + 2 * (x @ made.lora_a.T) @ made.lora_b.T
    torch.testing.assert_close(made(x), expected)
    assert isinstance(made, torch.nn.Linear)
    assert "rank=4, alpha=8" in repr(made)


def test_changes_nothing_at_first_and_trains_the_update_alone():
    base = torch.nn.Linear(12, 9)
    made, x = LoRALinear.of(base, 4), torch.randn(5, 12)
    torch.testing.assert_close(made(x), base(x))
    assert made.weight is base.weight
    made(x).sum().backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is not None] == ["lora_a", "lora_b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    made, x = layer(dtype=dtype), torch.randn(5, 12, dtype=dtype)
    weight, state = made.weight.clone(), copy.deepcopy(made.state_dict())
    apart = made(x)
    made.merge()
    made.merge()
    assert made.merged and not same_bits(made.weight, weight)
    torch.testing.assert_close(made(x), apart, atol=0.05 if dtype is torch.bfloat16 else 1e-5, rtol=0.02)
    assert all(same_bits(tensor, state[name]) for name, tensor in made.state_dict().items())
    other = copy.deepcopy(made)
    for module in (made, other):
        module.unmerge()
        module.unmerge()
        assert not module.merged and same_bits(module.weight, weight) and same_bits(module(x), apart)


def test_loading_unmerges():
    made, other = layer(), layer()
    made.merge()
    made.load_state_dict(other.state_dict())
    assert not made.merged and same_bits(made.weight, other.weight)


def test_errors():
    with pytest.raises(ValueError, match="rank is 0"):
        LoRALinear(3, 4, 0)
    with pytest.raises(TypeError, match="expected a torch.nn.Linear"):
        LoRALinear.of(torch.nn.Identity(), 4)
    assert LoRALinear.of(Linear(3, 4, bias=False), 2).bias is None
