"""Linear, with what follows the product fused into it."""

import torch
from torch import Tensor

from llmsys.ops.linear import linear


class Linear(torch.nn.Linear):
    """A drop-in for `torch.nn.Linear`: same parameters, initialisation and `state_dict`, and `isinstance` holds.

    `layer(x, residual)` is `activation(x · weightᵀ + bias) + residual`, as `llmsys.linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, activation=self.activation, residual=residual)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f"{super().extra_repr()}{activation}"
