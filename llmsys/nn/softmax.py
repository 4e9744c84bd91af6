"""Softmax over one dimension."""

import torch
from torch import Tensor

from llmsys.ops.softmax import softmax


class Softmax(torch.nn.Softmax):
    """`llmsys.softmax` over `dim`; `isinstance` of torch's holds.

    Errors     ValueError if dim is None, which torch takes for one that it guesses
    """

    def __init__(self, dim: int | None = None) -> None:
        if dim is None:
            raise ValueError("llmsys.nn.Softmax: dim is None, expected a dimension such as -1")
        super().__init__(dim)

    def forward(self, input: Tensor) -> Tensor:
        assert self.dim is not None
        return softmax(input.movedim(self.dim, -1)).movedim(-1, self.dim)
