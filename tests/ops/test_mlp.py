import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys.ops.mlp import OP, cases
from tests.harness import checks

SURFACE = {"mlp": "(x, gate_weight, up_weight, down_weight, activation='silu')"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


FORMULAS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def naive(x, gate_weight, up_weight, down_weight, activation):
    return F.linear(FORMULAS[activation](F.linear(x, gate_weight)) * F.linear(x, up_weight), down_weight)


def example(*shape, dtype=torch.float64):
    *tensors, _ = cases.inputs(shape, dtype)
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("shape", [(2, 3, 12), (5, 12), (12,)], ids=str)
def test_is_torchs_formula(activation, shape):
    """Value and gradients, in float64."""
    tensors = example(*shape)
    y, expected = llmsys.mlp(*tensors, activation), naive(*tensors, activation)
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        torch.testing.assert_close(llmsys.mlp(*tensors, activation), expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy))


def saved_bytes(call, tensors):
    """Bytes that `call(*tensors)` keeps for its backward, `tensors` apart, each memory counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*tensors)  # alive until the count, so that no memory is used twice
    for tensor in tensors:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("activation", FORMULAS)
def test_keeps_half_of_what_the_formula_keeps(activation):
    """gate and up; of the formula, f(gate) and h too."""
    rows, dim = 32, 64
    tensors = example(rows, dim, dtype=torch.bfloat16)
    wide = rows * tensors[1].shape[0] * 2
    assert saved_bytes(lambda *tensors: llmsys.mlp(*tensors, activation), tensors) == 2 * wide
    assert (
        saved_bytes(lambda *tensors: naive(*tensors, activation), tensors) == (3 if activation == "relu" else 4) * wide
    )


def test_autocast_casts_as_it_does_for_linear():
    tensors = example(4, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = llmsys.mlp(*tensors)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), tensors)
    expected = llmsys.mlp(*(tensor.bfloat16() for tensor in tensors))
    assert torch.equal(y, expected)
    assert [grad.dtype for grad in grads] == [torch.float32] * 4


def test_arguments_that_do_not_fit_are_refused():
    x, gate, up, down = example(4, 6)
    with pytest.raises(ValueError, match=r"shapes \(4, 6\), \(12, 6\), \(12, 6\), \(12, 6\), expected"):
        llmsys.mlp(x, gate, up, up)
    with pytest.raises(ValueError, match="activation is 'swish', expected one of"):
        llmsys.mlp(x, gate, up, down, "swish")
    with pytest.raises(TypeError, match="up_weight is torch.float32, expected torch.float64"):
        llmsys.mlp(x, gate, up.float(), down)
