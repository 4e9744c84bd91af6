"""From logits to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws tokens: temperature, then the `top_k` likeliest, then the smallest set of probability `top_p`.

    `temperature=0` takes the likeliest token; `top_k=0` and `top_p=1` leave nothing out.

    Source     top-p: Holtzman et al. 2020, arXiv:1904.09751, section 3.1
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"llmsys.infer.Sampler: temperature={self.temperature}, expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"llmsys.infer.Sampler: top_k={self.top_k}, expected 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"llmsys.infer.Sampler: top_p={self.top_p}, expected more than 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(…, V) logits of any float dtype → (…, V) float32 probabilities, 0 for what is left out."""
        logits = logits.float()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(_ranks(logits) >= self.top_k, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = descending.cumsum(-1) - descending  # of the likelier tokens; 0 for the first, which always stays
            left_out = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            probabilities = probabilities.masked_fill(left_out, 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, V) logits → (B,) tokens."""
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)


def _ranks(logits: Tensor) -> Tensor:
    """The place of each logit in descending order, the earlier of two equals first."""
    return logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
