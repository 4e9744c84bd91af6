import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys.ops._matmul import torch_matmul
from llmsys.ops.mlp import OP, cases, fused
from tests.harness import checks, same_bits

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


DH = ((5, 6), (6, 12))
NEEDED = [  # of 5 rows, width 6, inside 12: x, gate_weight, up_weight, down_weight
    [DH, ((5, 12), (12, 6)), ((5, 12), (12, 6))],
    [DH, ((12, 5), (5, 6))],
    [DH, ((12, 5), (5, 6))],
    [((6, 5), (5, 12))],
]


@pytest.mark.parametrize("trained", range(4))
def test_what_is_frozen_costs_no_product(trained, monkeypatch):
    """The gradient of one argument alone is that of all, to the bit, and takes its own products only."""
    made = []
    spy = lambda a, b, *args, **options: made.append((a.shape, b.shape)) or torch_matmul(a, b, *args, **options)  # noqa: E731
    monkeypatch.setitem(OP.implementations, "cpu", fused.implementation("cpu", spy))
    gradients = []
    for needing in (range(4), (trained,)):
        given = [tensor.detach().requires_grad_(i in needing) for i, tensor in enumerate(example(5, 6))]
        with llmsys.use(mlp="cpu"):
            loss = llmsys.mlp(*given).square().sum()
        made.clear()
        gradients.append(torch.autograd.grad(loss, given[trained])[0])
    assert sorted(made) == sorted(NEEDED[trained])
    assert same_bits(*gradients)


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


def test_on_meta_tensors():
    x, gate, up, down = (torch.empty(shape, device="meta") for shape in ((2, 3, 8), (17, 8), (17, 8), (5, 17)))
    assert llmsys.mlp(x, gate, up, down).shape == (2, 3, 5)
