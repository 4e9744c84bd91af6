"""RMSNorm, and its fusion with the residual addition before it."""

from typing import overload

import torch
from torch import Tensor

from llmsys.ops.add_rms_norm import add_rms_norm
from llmsys.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """A drop-in for `torch.nn.RMSNorm` over the last dimension: same `state_dict`, and `isinstance` holds.

    `eps` is 1e-6 where torch takes the machine epsilon of x.dtype. With `weight_offset=1` the weight is stored as its
    distance from one, as Gemma stores it. `norm(x, residual)` returns `(y, sum)` with `sum = x + residual` and
    `y = norm(sum)`, in one pass over memory.
    """

    eps: float
    weight_offset: float = 0.0

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, eps, device=device, dtype=dtype)
        self.weight_offset = weight_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)
        return add_rms_norm(x, residual, self.weight, self.eps, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.weight.shape[0]}, eps={self.eps}{offset}"
