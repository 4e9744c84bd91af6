"""LayerNorm, and its fusion with the residual addition before it."""

from typing import overload

import torch
from torch import Tensor

from llmsys.ops.add_layer_norm import add_layer_norm
from llmsys.ops.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """A drop-in for `torch.nn.LayerNorm` over the last dimension: same arguments and `state_dict`; `isinstance` holds.

    `norm(x, residual)` returns `(y, sum)` with `sum = x + residual` and `y = norm(sum)`, in one pass over memory.
    """

    eps: float

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, eps, elementwise_affine, bias, device=device, dtype=dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"llmsys.nn.LayerNorm: dim is {dim}, expected the size of one dimension, the last")

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)
