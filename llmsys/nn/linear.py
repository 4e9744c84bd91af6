"""Linear, with what follows the product fused into it; several linear layers of one input in one product."""

from collections.abc import Sequence

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


class FusedLinear(torch.nn.Linear):
    """Linear layers of one input, their weights one below the other: `q, k, v = layer(x)`, views of one product.

    sizes      the outputs of each. Who cuts the weight, as tensor parallelism does, says here what is left of each

    Errors     ValueError unless sizes are one or more numbers above 0
    """

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.sizes = tuple(sizes)
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"llmsys.nn.FusedLinear: sizes are {self.sizes}, expected one or more numbers above 0")
        super().__init__(in_features, sum(self.sizes), bias, device, dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return linear(x, self.weight, self.bias).split(self.sizes, -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sizes={self.sizes}"
