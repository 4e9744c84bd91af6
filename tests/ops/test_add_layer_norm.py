import pytest
import torch

from llmsys import add_layer_norm, layer_norm
from llmsys.ops.add_layer_norm import OP, cases
from tests.harness import checks, same_bits

SURFACE = {"add_layer_norm": "(x, residual, weight=None, bias=None, eps=1e-05, *, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def test_is_layer_norm_of_the_sum():
    x, residual, weight, bias, eps = cases.inputs((5, 40), torch.bfloat16)
    for parameters in ((weight, bias), (weight, None), (None, bias), (None, None)):
        y, total = add_layer_norm(x, residual, *parameters, eps)
        assert same_bits(total, x + residual)
        assert same_bits(y, layer_norm(total, *parameters, eps))


def test_errors():
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"llmsys.add_layer_norm: residual has shape \(2, 8\) on cpu"):
        add_layer_norm(x, x[:2], weight)
    with pytest.raises(TypeError, match="llmsys.add_layer_norm: residual is torch.float16, expected torch.float32"):
        add_layer_norm(x, x.half(), weight)
    with pytest.raises(ValueError, match=r"llmsys.add_layer_norm: x has shape \(3, 8\) and bias \(7,\)"):
        add_layer_norm(x, x, weight, weight[:7])
