"""Every family: `accelerate` changes which code runs, and nothing that can be seen beyond rounding."""

import copy
import inspect
import pickle

import pytest
import torch

import llmsys
from benchmarks.dropin import ASPECTS, compare
from benchmarks.families import FAMILIES, batch, build
from tests.harness import same_bits

SWAPPED = {  # of two layers
    "Llama 2": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Llama 3": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Mistral": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Mixtral": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Qwen2": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Qwen3": {"rms_norm": 9, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Gemma 2": {"geglu, tanh": 2, "rms_norm": 9, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Gemma 3": {"geglu, tanh": 2, "rms_norm": 13, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "Phi-3": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "OLMo 2": {"rms_norm": 9, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "GPT-2": {"gelu, tanh": 2, "layer_norm": 5, "attention": 2, "linear_cross_entropy": 1},
    "BERT": {"gelu": 3, "layer_norm": 6, "attention": 2},
    "Cohere": {"layer_norm": 3, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "GLM": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
}


def ops(report):
    found = [line.what for line in report.swapped]
    return {op: found.count(op) for op in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_gradient_and_steps(family):
    report, verdicts = compare(family)
    assert ops(report) == SWAPPED[family], report
    for aspect in ASPECTS:
        for verdict in verdicts[aspect]:
            assert verdict.right, f"{family} {aspect} {verdict}"


def test_the_comparison_sees_a_small_fault():
    def faulty(model):
        llmsys.accelerate(model)
        model.model.norm.variance_epsilon *= 1.2

    _, verdicts = compare("Llama 2", faulty)
    for aspect in ASPECTS:
        assert not all(verdict.right for verdict in verdicts[aspect]), aspect


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_is_bit_for_bit(family):
    model = build(family)
    expected = model(**batch())  # the first forward installs hooks of transformers' own
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    llmsys.accelerate(model)
    assert list(model.state_dict()) == list(state)
    model(**batch())
    llmsys.restore(model)
    for name, module in model.named_modules():
        cls, attributes = before[name]
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items()), name
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    actual = model(**batch())
    assert same_bits(actual.logits, expected.logits) and same_bits(actual.loss, expected.loss)
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_only_this_model_changes():
    model, other = build("Llama 2"), build("Llama 2")
    expected = other(**batch()).logits
    forward = type(other.model.layers[0].self_attn).forward
    llmsys.accelerate(model)
    assert type(other.model.layers[0].self_attn).forward is forward
    assert same_bits(other(**batch()).logits, expected)


def test_names_signatures_and_isinstance_stay():
    untouched, model = build("Llama 3"), build("Llama 3")
    llmsys.accelerate(model)
    for old, new in zip(untouched.modules(), model.modules(), strict=True):
        assert isinstance(new, type(old))
        assert type(new).__name__ == type(old).__name__ and type(new).__module__ == type(old).__module__
    assert inspect.signature(model.forward) == inspect.signature(untouched.forward)
    assert repr(model) == repr(untouched)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_accelerated_and_can_be_restored(copied):
    model = build("Phi-3")
    expected = model(**batch())
    llmsys.accelerate(model)
    other = copied(model)
    assert same_bits(other(**batch()).logits, model(**batch()).logits)
    llmsys.restore(other)
    assert same_bits(other(**batch()).logits, expected.logits)
    assert [type(module) for module in other.modules()] != [type(module) for module in model.modules()]


def test_a_second_call_starts_anew():
    model = build("Llama 2")
    llmsys.accelerate(model)
    report = llmsys.accelerate(model, only=["norm"])
    assert ops(report) == {"rms_norm": 5}
    mlp = model.model.layers[0].mlp
    assert type(mlp).forward is type(build("Llama 2").model.layers[0].mlp).forward


def test_only_and_exclude():
    assert ops(llmsys.accelerate(build("Llama 2"), only=["mlp", "norm"])) == {"rms_norm": 5, "swiglu": 2}
    without_norms = llmsys.accelerate(build("Llama 2"), exclude=["norm"])
    assert ops(without_norms) == {"swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1}
    assert ops(llmsys.accelerate(build("Llama 2"), only=["model.layers.1*"])) == {"rms_norm": 2, "swiglu": 1, "rope": 1}
    assert ops(llmsys.accelerate(build("Llama 2"), only=["norm"], exclude=["model.norm"])) == {"rms_norm": 4}


def test_arguments_that_cannot_be_honoured():
    model = build("Llama 2")
    for given in ({"only": ["norms"]}, {"exclude": ["model.layers.7"]}):
        with pytest.raises(ValueError, match="llmsys.accelerate: .* expected one of"):
            llmsys.accelerate(model, **given)
    with pytest.raises(ValueError, match="expected a list"):
        llmsys.accelerate(model, only="norm")
    for function in (llmsys.accelerate, llmsys.restore):
        with pytest.raises(TypeError, match="expected a torch.nn.Module"):
            function(model.forward)


def test_report():
    report = llmsys.accelerate(build("Gemma 2"))
    text = str(report)
    assert text.startswith("Gemma2ForCausalLM: ")
    assert "2 × model.layers.*.input_layernorm (Gemma2RMSNorm) → rms_norm" in text
    for line in report.left:
        assert line.what and line.path
    assert "nothing in it looks like" in str(llmsys.accelerate(torch.nn.Linear(2, 2)))
