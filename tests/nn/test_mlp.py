import torch
import torch.nn.functional as F

from llmsys.nn import MLP


def test_is_the_gated_formula_with_its_gradients():
    torch.manual_seed(0)
    mlp = MLP(12, 20)
    x = torch.randn(2, 3, 12, requires_grad=True)
    y = mlp(x)
    expected = (F.silu(x @ mlp.gate.weight.T) * (x @ mlp.up.weight.T)) @ mlp.down.weight.T
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    inputs = [x, *mlp.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))
