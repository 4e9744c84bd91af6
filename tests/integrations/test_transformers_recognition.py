"""Modules are known by structure and by what they compute: strangers of a known shape, but not lookalikes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import llmsys
from llmsys.integrations.transformers import norms
from tests.harness import same_bits


class Norm(nn.Module):
    """A stranger: its own names, its weight stored as the distance from one."""

    def __init__(self, dim=24, epsilon=1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.layer_epsilon = epsilon

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], None, self.layer_epsilon) * (1 + self.weight)


class Outside(Norm):
    """Epsilon is added after the root."""

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.layer_epsilon) * (1 + self.weight)


class Centred(Norm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Unweighted(Norm):
    """Right while the weight is zero, and only then."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], None, self.layer_epsilon)


class Raising(Norm):
    def forward(self, x, scale):
        raise AssertionError("never called with one argument")


class Gated(nn.Module):
    def __init__(self, limit=None):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.activation, self.limit = nn.SiLU(), limit

    def forward(self, x):
        gate, up = self.w1(x), self.w3(x)
        if self.limit:
            up = up.clamp(-self.limit, self.limit)
        return self.w2(up * self.activation(gate))


class Functional(Gated):
    """The activation is a function, not a module."""

    def __init__(self):
        super().__init__()
        del self.activation
        self.act = F.silu

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


def one(model):
    report = llmsys.accelerate(model)
    (line,) = (*report.swapped, *report.left)
    return line.what


@pytest.mark.parametrize("make", [Norm, Gated, Functional])
def test_strangers_of_a_known_shape(make):
    torch.manual_seed(0)
    module, x = make(), torch.randn(5, 24 if make is Norm else 8)
    expected = module(x)
    assert one(module) == ("rms_norm" if make is Norm else "swiglu")
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("make", [Outside, Centred, Unweighted, Raising])
def test_lookalikes_of_a_norm(make):
    module = make()
    module.weight.data.zero_()
    assert one(module) == "its forward is no rms_norm or layer_norm over the last dimension"
    assert type(module) is make


@pytest.mark.parametrize(
    "activation, op",
    [
        (nn.SiLU(), "swiglu"),
        (nn.GELU(), "geglu"),
        (nn.GELU("tanh"), "geglu, tanh"),
        (nn.ReLU(), "reglu"),
        (ACT2FN["gelu_new"], "geglu, tanh"),
        (ACT2FN["gelu_fast"], "geglu, tanh"),
    ],
)
def test_gated_units(activation, op):
    module, x = Gated(), torch.randn(5, 8)
    module.activation = activation
    expected = module(x)
    assert one(module) == op
    torch.testing.assert_close(module(x), expected)


class Plain(nn.Module):
    """Without a gate."""

    def __init__(self, activation):
        super().__init__()
        self.up, self.down, self.activation, self.dropout = nn.Linear(8, 12), nn.Linear(12, 8), activation, nn.Dropout()

    def forward(self, x):
        return self.dropout(self.down(self.activation(self.up(x))))


@pytest.mark.parametrize(
    "activation, op",
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (ACT2FN["gelu_new"], "gelu, tanh"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu, tanh"),
        (ACT2FN["relu2"], "relu2"),
    ],
)
def test_activations_that_stand_alone(activation, op):
    module, x = Plain(activation).eval(), torch.randn(5, 8)
    expected = module(x)
    assert one(module) == op
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("activation", [nn.Mish(), ACT2FN["quick_gelu"], nn.SiLU(inplace=True), nn.ReLU(), nn.Tanh()])
def test_lookalikes_of_an_activation(activation):
    report = llmsys.accelerate(nn.Sequential(activation, nn.Dropout(), nn.Identity(), nn.Flatten()))
    assert not report.swapped and not report.left


def test_lookalikes_of_an_mlp():
    report = llmsys.accelerate(Gated(limit=7.0))
    assert "its forward is no swiglu" in report.left[0].what
    assert [line.what for line in report.swapped] == ["silu"]  # its activation is one all the same
    swapped_gate = Gated()
    swapped_gate.activation = nn.Mish()
    assert "its forward is no swiglu" in one(swapped_gate)


def test_torch_modules():
    assert one(nn.RMSNorm(8, eps=1e-5)) == "rms_norm"
    assert "expected a number" in one(nn.RMSNorm(8))
    assert one(nn.LayerNorm(8)) == one(nn.LayerNorm(8, bias=False)) == "layer_norm"
    assert "no weight" in one(nn.LayerNorm(8, elementwise_affine=False))
    assert "one dimension" in one(nn.LayerNorm((2, 8)))
    ours = llmsys.accelerate(nn.Sequential(llmsys.nn.RMSNorm(8), llmsys.nn.MLP(8, 16)))
    assert not ours.swapped and not ours.left  # they run on these kernels as they are


def test_what_cannot_be_tried_says_why():
    with torch.device("meta"):
        assert "meta device" in one(Norm())
    replaced = Norm()
    replaced.forward = lambda x: x
    assert "replaced on the instance" in one(replaced)
    assert torch.equal(replaced(torch.ones(24)), torch.ones(24))


def test_trying_leaves_no_trace():
    """No hook fires, nothing is written, and no random number is drawn."""
    model = nn.Sequential(Norm(8), Gated())
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *given: calls.append(given))
        module.register_forward_pre_hook(lambda *given: calls.append(given))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    assert len(llmsys.accelerate(model).swapped) == 2
    assert not calls and torch.equal(torch.random.get_rng_state(), random_state)
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(torch.ones(2, 8))
    assert len(calls) == 2 * 6  # the activation is part of the op now


def test_a_class_put_over_ours_cannot_be_undone():
    model = nn.Sequential(Norm())
    llmsys.accelerate(model)
    ours = type(model[0])
    model[0].__class__ = type("Over", (ours,), {})
    with pytest.raises(RuntimeError, match="llmsys.restore: 0 was given the class"):
        llmsys.restore(model)
    model[0].__class__ = ours
    llmsys.restore(model)
    assert type(model[0]) is Norm


@pytest.mark.parametrize("rule", norms.RESULT_DTYPES)
def test_the_result_has_the_dtype_that_it_had(rule):
    """Input and weight of two dtypes: some norms return the wider, some the input's, T5 the weight's."""

    class Mixed(Norm):
        def forward(self, x):
            wide = super().forward(x.float()).float()
            return wide.to({"wider": torch.float32, "input": x.dtype, "weight": self.weight.dtype}[rule])

    for x_dtype, dtype in [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]:
        module, x = Mixed().to(dtype), torch.randn(3, 24).to(x_dtype)
        expected = module(x)
        if (
            rule == "wider" and dtype is torch.bfloat16
        ):  # its weight alone, in the probe, is narrower than what it returns
            continue
        assert one(module) == "rms_norm"
        actual = module(x)
        assert actual.dtype is expected.dtype
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)
