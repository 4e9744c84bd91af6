"""Rotary frequencies for more tokens than a model was trained on: each way is data, which `rope_tables` takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch


class RopeScaling(Protocol):
    """What `rope_tables` asks of a scaling."""

    def frequencies(self, dim: int, base: float) -> torch.Tensor:
        """Radians a token of each pair, (dim/2,) float64."""

    @property
    def attention(self) -> float:
        """What cos and sin are multiplied by: queries and keys both grow by it."""


def plain_frequencies(dim: int, base: float) -> torch.Tensor:
    """base^(-2i / dim). Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2"""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))


class _Checked:
    attention = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value is not False and not 0 < value < math.inf:
                raise ValueError(f"llmsys.{type(self).__name__}: {field.name} is {value}, expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class LinearScaling(_Checked):
    """Position interpolation: every position divided by `factor`.

    Source     Chen et al. 2023, arXiv:2306.15595, eq. 4
    """

    factor: float

    def frequencies(self, dim: int, base: float) -> torch.Tensor:
        return plain_frequencies(dim, base) / self.factor


@dataclass(frozen=True, kw_only=True)
class NTKScaling(_Checked):
    """NTK-aware: a larger base, so that the slowest pair turns `factor` times slower and the fastest as before.

    For the dynamic form, give the factor that a sequence length needs: `NTKScaling.dynamic`.

    Source     Peng et al. 2023, arXiv:2309.00071, definition 1 (first by bloc97, 2023)
    """

    factor: float

    @classmethod
    def dynamic(cls, factor: float, *, num_tokens: int, original_max_tokens: int) -> NTKScaling:
        """The factor for a sequence of `num_tokens`: 1 up to `original_max_tokens`, rising from there.

        Source     emozilla 2023, as in Hugging Face transformers, `dynamic`
        """
        stretch = max(num_tokens, original_max_tokens) / original_max_tokens
        return cls(factor=factor * stretch - (factor - 1))

    def frequencies(self, dim: int, base: float) -> torch.Tensor:
        if dim <= 2:
            raise ValueError(f"llmsys.NTKScaling: dim is {dim}, expected at least 4: with one pair there is no slowest")
        return plain_frequencies(dim, base * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True, kw_only=True)
class YarnScaling(_Checked):
    """YaRN: pairs that turn more than `beta_fast` times in the original length stay, those that turn less than
    `beta_slow` times are interpolated, those between are mixed along a ramp over the pairs.

    `attention_factor` None stands for the paper's 0.1 · ln(factor) + 1. `truncate` widens the ramp to whole pairs.

    Source     Peng et al. 2023, arXiv:2309.00071, definition 2 and eq. 22; the ramp in pairs as in its authors' code
    """

    factor: float
    original_max_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"llmsys.YarnScaling: beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}, "
                "expected beta_fast >= beta_slow"
            )

    @property
    def attention(self) -> float:  # type: ignore[override]
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, dim: int, base: float) -> torch.Tensor:
        def pair_that_turns(times: float) -> float:
            return dim * math.log(self.original_max_tokens / (2 * math.pi * times)) / (2 * math.log(base))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        pairs = torch.arange(dim // 2, dtype=torch.float64)
        interpolated = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return plain_frequencies(dim, base) * (interpolated / self.factor + (1 - interpolated))


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(_Checked):
    """Llama 3.1's: pairs that turn more than `high_freq_factor` times in the original length stay, those that turn less
    than `low_freq_factor` times are interpolated, those between are mixed by how often they turn.

    Source     Grattafiori et al. 2024, arXiv:2407.21783, section 3.2; the formula: `apply_scaling` in meta-llama/llama3
    """

    factor: float
    original_max_tokens: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"llmsys.Llama3Scaling: high_freq_factor is {self.high_freq_factor} and low_freq_factor "
                f"{self.low_freq_factor}, expected high_freq_factor > low_freq_factor"
            )

    def frequencies(self, dim: int, base: float) -> torch.Tensor:
        plain = plain_frequencies(dim, base)
        turns = self.original_max_tokens * plain / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)
