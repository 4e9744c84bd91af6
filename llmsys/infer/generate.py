"""Text from a model, one token at a time."""

from typing import Protocol

import torch

from llmsys.infer.sampler import Sampler
from llmsys.models.llama import Llama


class Codec(Protocol):
    """What `generate` asks of a tokenizer; `llmsys.data.Tokenizer` is one."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


@torch.inference_mode()
def generate(
    model: Llama,
    tokenizer: Codec,
    prompt: str,
    *,
    max_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop_token: int | None = None,
) -> str:
    """The text that follows `prompt`: up to `max_tokens` tokens, or until `stop_token`, which is not part of it.

    The model reads at most its last `max_sequence_length` tokens, anew for each token.

    Errors     ValueError if the prompt is empty or max_tokens < 1
    """
    tokens = list(tokenizer.encode(prompt))
    if not tokens:
        raise ValueError(f"llmsys.infer.generate: prompt {prompt!r} of no tokens, expected at least one")
    if max_tokens < 1:
        raise ValueError(f"llmsys.infer.generate: max_tokens={max_tokens}, expected at least 1")
    sampler = sampler or Sampler()
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    generated: list[int] = []
    for _ in range(max_tokens):
        window = (tokens + generated)[-model.config.max_sequence_length :]
        logits_BTV = model(torch.tensor([window], device=device))
        token = int(sampler(logits_BTV[:, -1], generator))
        if token == stop_token:
            break
        generated.append(token)
    return tokenizer.decode(generated)
