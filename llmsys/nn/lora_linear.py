"""A linear layer with a low-rank update that is trained in its place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmsys.ops.linear import linear
from llmsys.ops.lora_linear import lora_linear, lora_merge


class LoRALinear(torch.nn.Linear):
    """`torch.nn.Linear` with weight and bias frozen, and `lora_a` (rank, in), `lora_b` (out, rank) that are trained.

        y = x · weightᵀ + bias + (alpha / rank) · (x · lora_aᵀ) · lora_bᵀ

    `merge()` adds the update to the weight, so that a forward is one product; `unmerge()` gives the weight back, which
    is kept for that. What is merged trains nothing. A `state_dict` holds the unmerged weight, always.

    Source     Hu et al. 2021, arXiv:2106.09685: lora_a at random, lora_b zero, so that nothing changes at first
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adapt(rank, alpha)

    @classmethod
    def of(cls, layer: torch.nn.Linear, rank: int, *, alpha: float | None = None) -> LoRALinear:
        """On the weight and bias of `layer`, which it shares and freezes.

        Errors     TypeError if layer is no torch.nn.Linear
        """
        if not isinstance(layer, torch.nn.Linear):
            raise TypeError(f"llmsys.nn.LoRALinear: layer is a {type(layer).__name__}, expected a torch.nn.Linear")
        made = cls.__new__(cls)
        torch.nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.weight, made.bias = layer.weight, layer.bias
        made._adapt(rank, alpha)
        return made

    def _adapt(self, rank: int, alpha: float | None) -> None:
        if rank < 1:
            raise ValueError(f"llmsys.nn.LoRALinear: rank is {rank}, expected at least 1")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.lora_a = torch.nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = torch.nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        torch.nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._base: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        return self._base is not None

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return linear(input, self.weight, self.bias)
        return lora_linear(input, self.weight, self.lora_a, self.lora_b, scale=self.scale, bias=self.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight. Nothing happens if it is merged."""
        if not self.merged:
            self._base = self.weight.detach().clone()
            merged, _ = lora_merge(self.weight, self.lora_a, self.lora_b, scale=self.scale)
            self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the weight back that `merge` found. Nothing happens if it is not merged."""
        if self._base is not None:
            self.weight.copy_(self._base)
            self._base = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base is not None:
            destination[f"{prefix}weight"] = self._base

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"
