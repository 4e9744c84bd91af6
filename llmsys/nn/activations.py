"""Drop-ins for torch's activation modules."""

import torch
from torch import Tensor

from llmsys.ops.gelu import gelu
from llmsys.ops.silu import silu


class GELU(torch.nn.GELU):
    """`llmsys.gelu`; `isinstance` of torch's holds."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """`llmsys.silu`, out of place; `isinstance` of torch's holds."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)
