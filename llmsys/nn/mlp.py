"""The gated feed-forward layer of Llama-style models."""

import torch
from torch import Tensor

from llmsys.ops.mlp import mlp


class MLP(torch.nn.Module):
    """`down(silu(gate(x)) · up(x))`, three matrices without bias; `llmsys.mlp` says what is kept for the backward.

    Shapes     x (..., dim) → (..., dim); gate and up (hidden_dim, dim), down (dim, hidden_dim)
    Source     Shazeer 2020, arXiv:2002.05202, eq. 6 (FFN_SwiGLU)
    """

    tokenwise = True  # each token's result is of that token alone

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate = torch.nn.Linear(dim, hidden_dim, bias=False)
        self.up = torch.nn.Linear(dim, hidden_dim, bias=False)
        self.down = torch.nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.gate.weight, self.up.weight, self.down.weight)
