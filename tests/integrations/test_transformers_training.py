"""What is done with a model works on an accelerated one: adapters, checkpointing, compile, generate, save, autocast."""

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmsys
from benchmarks.dropin import ASPECTS, Wide, train, verdicts
from benchmarks.families import batch, build
from tests.harness import same_bits


def accelerated(family, **changes):
    model = build(family, **changes)
    assert llmsys.accelerate(model).swapped
    return model


def assert_right(ours, same, truth):
    found = verdicts(ours, same, truth)
    for aspect in ASPECTS:
        for verdict in found[aspect]:
            assert verdict.right, f"{aspect} {verdict}"


@pytest.mark.parametrize("family", ["Llama 2", "Phi-3", "Gemma 3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(family, reentrant):
    kept, checkpointed = accelerated(family), accelerated(family)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    expected, actual = train(kept), train(checkpointed)
    for aspect in ASPECTS:
        for name, tensor in expected[aspect].items():
            assert same_bits(actual[aspect][name], tensor), f"{aspect} {name}"


@pytest.mark.parametrize("adapters_first", [False, True])
def test_lora_adapters(adapters_first):
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False
    )

    def adapted(model, accelerate):
        if accelerate and not adapters_first:
            assert llmsys.accelerate(model).swapped
        torch.manual_seed(0)
        model = peft.get_peft_model(model, settings)
        if accelerate and adapters_first:
            report = llmsys.accelerate(model)
            assert {line.what for line in report.swapped} >= {"rms_norm", "swiglu", "rope"}
        return model

    same, ours = adapted(build("Llama 3"), False), adapted(build("Llama 3"), True)
    wide = copy.deepcopy(same).double()
    with Wide():
        truth = train(wide)
    assert_right(train(ours), train(same), truth)
    assert list(peft.get_peft_model_state_dict(ours)) == list(peft.get_peft_model_state_dict(same))
    merged = ours.merge_and_unload()
    llmsys.restore(merged)
    assert [type(module) for module in merged.modules()] == [type(module) for module in build("Llama 3").modules()]


def test_compile():
    """One graph, in which the ops are nodes, and the same numbers."""
    same = build("Llama 3", num_hidden_layers=1)
    wide, ours = copy.deepcopy(same).double(), accelerated("Llama 3", num_hidden_layers=1)
    with Wide():
        truth = train(wide)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    ours.compile(backend=backend, fullgraph=True)
    assert_right(train(ours), train(same), truth)
    for op in ("rms_norm", "swiglu", "rope"):
        assert f"llmsys.{op}.default" in seen


@pytest.mark.parametrize("family", ["Llama 3", "Mixtral", "Gemma 3", "GLM"])
def test_generate(family):
    """The same tokens, greedily, from prompts of which one is padded; the cache is in use."""
    changes = {"output_router_logits": False} if family == "Mixtral" else {}  # whose loss generate cannot compute
    same, ours = build(family, **changes).eval(), accelerated(family, **changes).eval()
    prompt = {name: tensor[:, :12] for name, tensor in batch().items() if name != "labels"}
    expected = same.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert expected.shape[1] > 12
    assert torch.equal(ours.generate(**prompt, max_new_tokens=12, do_sample=False), expected)


def test_save_and_load(tmp_path):
    untouched, model = build("Qwen3"), accelerated("Qwen3")
    model.save_pretrained(tmp_path / "ours")
    untouched.save_pretrained(tmp_path / "untouched")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "untouched" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").train()
    assert [type(module) for module in loaded.modules()] == [type(module) for module in untouched.modules()]
    assert same_bits(loaded(**batch()).logits, untouched(**batch()).logits)
    llmsys.accelerate(loaded)
    assert same_bits(loaded(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("family", ["Llama 2", "Gemma 3", "Mixtral"])
def test_labels_and_counts(family):
    """`num_items_in_batch`, `logits_to_keep`, recorded states and attentions are what they were."""
    same, ours = build(family, attn_implementation="eager"), accelerated(family, attn_implementation="eager")
    for options in (
        {"num_items_in_batch": torch.tensor(17)},
        {"output_hidden_states": True, "output_attentions": True},
    ):
        expected, actual = same(**batch(), **options), ours(**batch(), **options)
        torch.testing.assert_close(actual.loss, expected.loss)
        assert actual.keys() == expected.keys()
        for key in ("hidden_states", "attentions"):
            torch.testing.assert_close(actual.get(key), expected.get(key))
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    expected, actual = same(**inputs, logits_to_keep=1), ours(**inputs, logits_to_keep=1)
    assert actual.loss is None and actual.logits.shape == expected.logits.shape


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 2", "OLMo 2", "Phi-3", "Qwen3", "GLM"])
def test_dtypes_of_every_module_under_autocast(family):
    """Float32 weights, bfloat16 products: each module returns what it returned, in the dtype it had."""

    def seen(model):
        found = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _module, _inputs, output, name=name: found.update({name: output}))
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch()).loss.backward()
        return {name: output for name, output in found.items() if isinstance(output, torch.Tensor)}

    expected, actual = seen(build(family)), seen(accelerated(family))
    real = batch()["attention_mask"].bool()  # Gemma 2's eager attention has means over all keys at padding
    assert actual.keys() <= expected.keys()  # activations inside a fused MLP are not called
    for name, tensor in actual.items():
        assert tensor.dtype is expected[name].dtype, name
        pair = (tensor, expected[name])
        if tensor.shape[:2] == real.shape:
            pair = tuple(x[real] for x in pair)
        torch.testing.assert_close(*pair, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama 2", "Gemma 3", "OLMo 2", "Cohere"])
def test_narrow_models_are_as_near_to_the_truth(family, dtype):
    """In a narrow dtype ours rounds less often: no further from float64 than twice the untouched model."""
    narrow = build(family).to(dtype)
    wide, ours = copy.deepcopy(narrow).double(), copy.deepcopy(narrow)
    report = llmsys.accelerate(ours)
    assert not any(line.kind == "norm" and "RMS" in line.module for line in report.left), report
    with Wide(), torch.no_grad():
        truth = wide(**batch()).logits
    with torch.no_grad():
        error = (ours(**batch()).logits.double() - truth).abs().max()
        assert error <= 2 * (narrow(**batch()).logits.double() - truth).abs().max()
