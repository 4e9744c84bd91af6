"""`attn_implementation="llmsys"` against eager attention: outputs, gradients, masks, caches.

Truth is the eager model in float64, and ours may be off by twice (gradients three times) what the eager model is off in
float32, and one rounding; gradients by the largest of the model's. Tokens that are padding are not compared: eager
attention gives them means over all keys. Over 400 lines: one interface, and every family's way to call it.
"""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    masking_utils,
)

import llmsys
from benchmarks.dropin import Wide
from benchmarks.families import FAMILIES, SIZES, VOCABULARY
from llmsys.integrations.transformers import attention, switch
from llmsys.ops._verify import judge
from tests.harness import same_bits

OTHERS = {
    "Gemma 2": ("gemma2", {**SIZES, "sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "GPT-NeoX": ("gpt_neox", {**SIZES, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "gpt-oss": ("gpt_oss", {**SIZES, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ModernBERT": ("modernbert", {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1,
                                  "sep_token_id": 2}),
    "T5": ("t5", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
                  "dropout_rate": 0.0, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0}),
    "BART": ("bart", {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                      "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0,
                      "vocab_size": VOCABULARY, "max_position_embeddings": 64, "forced_eos_token_id": None}),
    "Whisper": ("whisper", {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                            "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0,
                            "vocab_size": VOCABULARY, "num_mel_bins": 8, "max_source_positions": 20,
                            "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                            "decoder_start_token_id": 1, "begin_suppress_tokens": None, "suppress_tokens": None}),
}  # fmt: skip
DECODERS = ["Llama 3", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "GPT-2", "GPT-NeoX", "gpt-oss"]
ENCODERS = ["BERT", "ModernBERT"]
ENCODER_DECODERS = ["T5", "BART", "Whisper"]
AUTO = {
    **dict.fromkeys(DECODERS, AutoModelForCausalLM),
    **dict.fromkeys(ENCODERS, AutoModelForMaskedLM),
    **dict.fromkeys(ENCODER_DECODERS, AutoModelForSeq2SeqLM),
    "Whisper": AutoModelForSpeechSeq2Seq,
}


def build(family, **changes):
    model_type, settings = {**FAMILIES, **OTHERS}[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**settings, **changes})
        model = AUTO[family].from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def with_ours(model):
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("llmsys")
    assert {m.config._attn_implementation for m in ours.modules() if hasattr(m, "config")} == {"llmsys"}
    return ours


def tokens(batch=2, length=24, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side, lengths=(24, 17)):
    mask = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[length:] = 0
    return mask.flip(1) if side == "left" else mask


PACKED = torch.tensor([[*range(9), *range(1), *range(14)], [*range(3), *range(21)]])


def run(model, given, real):
    """Logits of real tokens, and all gradients of a loss of them, as `judge` names them."""
    model.zero_grad()
    logits = model(**given, use_cache=False).logits
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if real is None else real.bool()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logits[real] * weights[real].to(logits.dtype)).sum().backward()
    gradients = {f"d{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits[real].detach(), **gradients}


def assert_equal(model, given, real=None):
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # the grouped product has no float64
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    with Wide():
        truth = run(wide, doubled, real)
    same, ours = run(model, given, real), run(with_ours(model), given, real)
    assert ours.keys() == truth.keys()
    verdict = judge("logits", [(ours.pop("logits"), same.pop("logits"), truth.pop("logits"))])
    assert verdict.right, verdict
    # Of few elements the largest error is a matter of luck: all gradients together, each by its largest element.
    sizes = {name: float(true.abs().max()) or 1.0 for name, true in truth.items()}
    found = {name: tuple(results[name] / sizes[name] for results in (ours, same, truth)) for name in sizes}
    allowed = judge("dall", list(found.values())).allowed
    for name, triple in found.items():
        verdict = judge(f"d{name}", [triple])
        assert verdict.error <= allowed, f"{name}: error {verdict.error}, allowed {allowed}"


@pytest.fixture
def no_dense_masks(monkeypatch):
    """A mask of T · S elements is an error."""

    sdpa = masking_utils.sdpa_mask

    def dense(*args, config, **options):
        assert config._attn_implementation == "eager", "a mask was made in its whole size"
        return sdpa(*args, config=config, **options)

    monkeypatch.setattr(masking_utils, "sdpa_mask", dense)


MASKS = {
    "all": ({}, None),
    "left": ({"attention_mask": padded("left")}, padded("left")),
    "right": ({"attention_mask": padded("right")}, padded("right")),
    "packed": ({"position_ids": PACKED}, None),
}


@pytest.mark.usefixtures("no_dense_masks")
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family, masked):
    given, real = MASKS[masked]
    assert_equal(build(family), {"input_ids": tokens(), **given}, real)


@pytest.mark.usefixtures("no_dense_masks")
@pytest.mark.parametrize("masked", ["all", "left", "right"])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, masked):
    given, real = MASKS[masked]
    assert_equal(build(family), {"input_ids": tokens(), **given}, real)


def source(family, masked):
    if family == "Whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": tokens(), **MASKS[masked][0]}


@pytest.mark.usefixtures("no_dense_masks")
@pytest.mark.parametrize("masked", ["all", "right"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders(family, masked):
    """Cross attention; T5's position bias has a gradient."""
    mask = padded("right", (11, 6)) if masked == "right" else torch.ones(2, 11, dtype=torch.long)
    given = {"decoder_input_ids": tokens(length=11, seed=1), "decoder_attention_mask": mask}
    assert_equal(build(family), {**source(family, masked), **given}, mask)


@pytest.mark.usefixtures("no_dense_masks")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_generate(family, cache):
    """The same tokens from the same logits, beyond the sliding windows; one prompt is padded."""
    model = build(family).eval()
    ours, given = with_ours(model), {"input_ids": tokens(length=10), "attention_mask": padded("left", (10, 6))}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "disable_compile": True,
               "cache_implementation": cache, "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    expected, actual = (m.generate(**given, **options) for m in (model, ours))
    assert expected.sequences.shape == (2, 22) and torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_dense_masks")
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_generate_from_a_source(family):
    model = build(family).eval()
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "disable_compile": True}
    expected, actual = (m.generate(**source(family, "right"), **options) for m in (model, with_ours(model)))
    assert torch.equal(actual, expected) and actual.shape[1] >= 10


@pytest.mark.usefixtures("no_dense_masks")
@pytest.mark.parametrize("family", ["Llama 3", "Mistral", "Gemma 3", "gpt-oss"])
def test_prompt_in_pieces(family):
    """Several tokens after a cache: queries are fewer than keys, and the window begins within the cache."""
    model = build(family).eval()
    ours, given = with_ours(model), tokens(length=22)
    whole, cache, pieces = model(given).logits, None, []
    for piece in given.split([9, 1, 7, 5], 1):
        output = ours(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_packed_sequences_do_not_see_each_other():
    ours = with_ours(build("Mistral"))
    first, second = tokens(1, 13), tokens(1, 20, seed=1)
    positions = torch.cat((torch.arange(13), torch.arange(20)))[None]
    together = ours(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([ours(x, use_cache=False).logits for x in (first, second)], 1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    starts = torch.tensor([0, 13, 33], dtype=torch.int32)  # as flash-attention's data collators give them
    flash = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 20, "max_length_k": 20}
    given = ours(torch.cat((first, second), 1), position_ids=positions, use_cache=False, **flash).logits
    torch.testing.assert_close(given, apart, rtol=1e-4, atol=1e-4)


def mask_of(function, queries, keys, q_offset=0, kv_offset=0, padding=None):
    options = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset}
    return attention.mask(**options, mask_function=function, attention_mask=padding, allow_is_causal_skip=False)


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "all": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "both": masking_utils.sliding_window_bidirectional_mask_function(3),
    "padding": masking_utils.causal_mask_function,
    "packed": masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(
            masking_utils.sliding_window_causal_mask_function(4), PACKED[:, :9]
        ),
        masking_utils.packed_sequence_mask_function((PACKED[:, :9] == 0).cumsum(1)),
    ),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    "blocks": masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]] * 2)),
    ),
}


SIZES_AND_OFFSETS = [(9, 9, 0, 0), (4, 9, 5, 0), (1, 9, 8, 0), (4, 9, 2, 0), (3, 6, 6, 3)]


@pytest.mark.parametrize(
    ("kind", "queries", "keys", "q_offset", "kv_offset"),
    # Packed sequences have as many queries as keys.
    [(kind, *sizes) for kind in FUNCTIONS for sizes in SIZES_AND_OFFSETS[: 1 if kind == "packed" else None]],
)
def test_masks_say_what_transformers_says(kind, queries, keys, q_offset, kv_offset):
    """What the layers compute with a mask, a query at a time, from its numbers."""
    padding = padded("left", (9, 7)).bool() if kind == "padding" else None
    mask = mask_of(FUNCTIONS[kind], queries, keys, q_offset, kv_offset, padding)
    expected = masking_utils.sdpa_mask(2, queries, keys, q_offset, kv_offset, FUNCTIONS[kind], padding,
                                       allow_is_causal_skip=False)  # fmt: skip
    known = kind not in ("chunks", "blocks") and not (kind == "both" and q_offset - kv_offset + queries < keys)
    assert isinstance(mask, attention.Mask) == known
    assert mask.shape == expected.shape and mask.dtype == torch.bool
    q, k = torch.zeros(2, 1, queries, 16), torch.zeros(2, 1, keys, 16)
    v = torch.eye(keys, 16).expand(2, 1, -1, -1)
    y, _ = attention.forward(nn.Module(), q, k, v, mask)
    seen = y[:, :, 0, :keys] > 0
    assert torch.equal(seen, expected[:, 0])
    assert torch.equal(mask & True, expected) and torch.equal(mask[..., 1:], expected[..., 1:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions(dtype):
    """A user's own: every query sees itself and what chance says."""
    model = build("Llama 3")
    seen = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    seen |= torch.eye(24, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    expected = model(tokens(), attention_mask=added).logits
    actual = with_ours(model)(tokens(), attention_mask=seen if dtype is torch.bool else added).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_name_is_known_at_construction():
    config = AutoConfig.for_model("llama", **SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="llmsys")
    assert model.config._attn_implementation == "llmsys" and model(tokens()).logits.isfinite().all()


def test_dropout():
    """In training alone; a share of the probabilities; repeated by torch's seed and by recomputation."""
    q, k = torch.zeros(1, 4, 200, 16), torch.zeros(1, 4, 200, 16)
    v = torch.eye(200, 200).expand(1, 4, -1, -1)
    y, _ = attention.forward(nn.Module(), q, k, v, None, dropout=0.25, is_causal=False)
    share = (y == 0).double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5
    torch.testing.assert_close(y.max(), torch.tensor(1 / 200 / 0.75))
    ours = with_ours(build("Llama 3", attention_dropout=0.3))

    def gradients(**options):
        ours.gradient_checkpointing_enable(**options) if options else ours.gradient_checkpointing_disable()
        torch.manual_seed(3)
        ours.zero_grad()
        ours(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in ours.parameters()])

    once = gradients()
    assert torch.equal(once, gradients())
    assert torch.equal(once, gradients(gradient_checkpointing_kwargs={"use_reentrant": False}))
    assert torch.equal(once, gradients(gradient_checkpointing_kwargs={"use_reentrant": True}))
    first, second = (ours.eval()(tokens()).logits for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_and_bfloat16():
    model = build("Llama 3")
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (m(tokens()).logits for m in (model, with_ours(model)))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    assert with_ours(model.bfloat16())(tokens()).logits.dtype == torch.bfloat16


def test_compile():
    """One graph, with `attention` a node of it."""
    model = build("Mistral", num_hidden_layers=1)
    ours, nodes = with_ours(model), []
    expected = model(tokens(), attention_mask=padded("right"), use_cache=False).logits

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    ours.compile(backend=backend, fullgraph=True)
    actual = ours(tokens(), attention_mask=padded("right"), use_cache=False).logits
    assert "llmsys.attention.default" in nodes
    real = padded("right").bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)


def test_attention_weights_are_refused():
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match='output_attentions is True, expected False .*"eager" does'):
        attention.forward(nn.Module(), x, x, x, None, output_attentions=True)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS, *ENCODER_DECODERS])
def test_accelerate_switches_it(family):
    """What is computed is what `set_attn_implementation` has, masks too; a model of the same configuration stays."""
    config = build(family).config
    config._attn_implementation = None
    model, other = (type(build(family))(config) for _ in range(2))
    before = {name: module.config for name, module in model.named_modules() if "config" in vars(module)}
    report = llmsys.accelerate(model, only=["attention"])
    layers = [model.get_submodule(line.path) for line in report.swapped]
    assert len(layers) == (6 if family in ENCODER_DECODERS else 2) and not report.left, report
    assert {layer.config._attn_implementation for layer in layers} == {"llmsys"}
    assert config._attn_implementation != "llmsys" and other.config is config and isinstance(model.config, type(config))
    given = source(family, "right") if family in ENCODER_DECODERS else {"input_ids": tokens()}
    if family in ENCODER_DECODERS:
        given["decoder_input_ids"] = tokens(length=11, seed=1)
    by_hand = with_ours(copy.deepcopy(other))
    by_hand.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    expected = by_hand(**given, use_cache=False).logits
    torch.manual_seed(0)
    assert same_bits(copy.deepcopy(model)(**given, use_cache=False).logits, expected)
    layers[0].config.use_cache = False  # one and the same but for the name
    assert layers[0].config.base.use_cache is False
    llmsys.restore(model)
    assert all(model.get_submodule(name).config is own for name, own in before.items())


def test_accelerate_leaves_what_was_asked_for():
    """Eager attention of a model that has another; one layer of several that share a configuration."""
    model = build("Llama 3")
    report = llmsys.accelerate(model, only=["attention"])
    assert {line.what for line in report.left} == {'its configuration asks for "eager", not for the default, "sdpa"'}
    model.set_attn_implementation("sdpa")
    report = llmsys.accelerate(model, only=["attention"], exclude=["model.layers.1.*"])
    assert not report.swapped and ["swapped together" in line.what for line in report.left] == [True]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda model: model.double(),
            r"no kernel of ours .* torch.float64 on cpu \(.*cpu: no kernel for torch.float64",
        ),
        (lambda model: model.to("meta"), "meta device, where nothing can be tried"),
    ],
    ids=["float64", "meta"],
)
def test_accelerate_leaves_what_no_kernel_can_run(change, reason):
    """Of the same model in other dtypes it swaps; by the weights that it has when it is asked."""
    model = build("Llama 3")
    model.set_attn_implementation("sdpa")
    for dtype in (torch.float32, torch.bfloat16):
        assert len(llmsys.accelerate(model.to(dtype), only=["attention"]).swapped) == 2
    report = llmsys.accelerate(change(model), only=["attention"])
    assert not report.swapped and len(report.left) == 2
    assert all(re.search(reason, line.what) for line in report.left), report
    assert model.config._attn_implementation == "sdpa" and not isinstance(model.config, switch.View)


def test_accelerate_asks_the_models_weights_where_an_attention_has_no_floats():
    """As with projections of integers, which are multiplied into the dtype of the rest."""
    model = build("Llama 3").bfloat16()
    model.set_attn_implementation("sdpa")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight.requires_grad_(False)
            weight.data = weight.data.to(torch.int8)
    assert len(llmsys.accelerate(model, only=["attention"]).swapped) == 2


@pytest.mark.parametrize("fault", ["scale", "softmax", "sinks"])
def test_accelerate_leaves_another_attention(fault, monkeypatch):
    """One that computes something else is known by its numbers."""
    from transformers.models.gpt_oss import modeling_gpt_oss as code

    own = code.eager_attention_forward

    def other(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        if fault == "scale":
            scaling = scaling * 1.001
        if fault == "sinks":
            module.sinks = nn.Parameter(module.sinks * 1.001)
        y, weights = own(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        return (y * 1.001 if fault == "softmax" else y), weights

    monkeypatch.setattr(code, "eager_attention_forward", other)
    report = llmsys.accelerate(build("gpt-oss"), only=["attention"])
    assert {line.what for line in report.left} == {"its own attention is no attention that the op computes"}
