import pytest
import torch

from llmsys.nn import FusedLinear


def test_fused_layers_are_several():
    torch.manual_seed(0)
    fused, x = FusedLinear(6, (4, 2, 2)), torch.randn(3, 6, requires_grad=True)
    found = fused(x)
    weights, biases = fused.weight.split((4, 2, 2)), fused.bias.split((4, 2, 2))
    expected = [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    torch.testing.assert_close(found, tuple(expected))
    grads = [
        torch.autograd.grad(sum(y.square().sum() for y in ys), (x, *fused.parameters())) for ys in (found, expected)
    ]
    torch.testing.assert_close(*grads)
    assert isinstance(fused, torch.nn.Linear) and repr(fused).endswith("bias=True, sizes=(4, 2, 2))")


@pytest.mark.parametrize("sizes", [(), (4, 0)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=r"sizes are \(.*\), expected one or more numbers above 0"):
        FusedLinear(6, sizes)
