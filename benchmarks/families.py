"""Small models of every family that `llmsys.accelerate` is tried on: two layers, random weights, nothing downloaded."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import: it talks of image libraries not installed

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

VOCABULARY = 160
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT_2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# name → the model type of transformers, and its configuration
FAMILIES: dict[str, tuple[str, dict]] = {
    "Llama 2": ("llama", SIZES | {"num_key_value_heads": 4}),
    "Llama 3": ("llama", SIZES | {"rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": True}),
    "Mistral": ("mistral", SIZES | {"sliding_window": 8}),
    "Mixtral": ("mixtral", SIZES | {"num_local_experts": 4, "output_router_logits": True}),
    "Qwen2": ("qwen2", SIZES),
    "Qwen3": ("qwen3", SIZES),
    "Gemma 2": ("gemma2", SIZES | {"sliding_window": 8}),
    "Gemma 3": ("gemma3_text", SIZES | {"sliding_window": 8}),
    "Phi-3": ("phi3", SIZES | NO_DROPOUT),
    "OLMo 2": ("olmo2", SIZES),
    "GPT-2": ("gpt2", GPT_2_SIZES | NO_DROPOUT | {"bos_token_id": 1, "eos_token_id": 2}),
    "BERT": ("bert", SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "Cohere": ("cohere", SIZES),
    "GLM": ("glm", SIZES),
}


def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """The model, in training. Every parameter is off its initial value, so that no scale is 1 and no bias 0."""
    model_type, settings = FAMILIES[family]
    auto = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(model_type, **{**settings, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second padded on the left; labels, some of them not to be learnt."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (2, 24), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :6] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, 3:5] = -100
    labels[1, 6] = -100  # predicted from padding, where each kind of attention has something else
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
