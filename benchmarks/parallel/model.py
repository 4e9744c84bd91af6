"""A Llama in PyTorch's own operators, which every contender trains: what differs is how it is made parallel.

Names and weights are those of `llmsys.models.Llama`. It can be called whole, as DistributedDataParallel, FSDP2, DTensor
and `torch.distributed.pipelining` expect, the parts that a pipeline stage does not hold being None; and it says its
parts, as `llmsys.parallel` expects.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmsys.models.llama import LlamaConfig


@cache
def angles(length: int, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, (length, 1, head_dim / 2)."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = torch.arange(length, dtype=torch.float64)[:, None, None] * frequencies
    return turns.cos().to(dtype), turns.sin().to(dtype)


def rotated(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BTHK.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def mean_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, -2), targets_BT.flatten())


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim, self.base = config.head_dim, config.rope_theta
        self.wq = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        cos, sin = angles(q_BTHK.shape[1], self.head_dim, self.base, q_BTHK.dtype)
        q_BTHK, k_BTHK = rotated(q_BTHK, cos, sin), rotated(k_BTHK, cos, sin)
        q_BHTK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, enable_gqa=True)
        return self.wo(y_BHTK.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Llama(nn.Module):
    """With the `weights` it is given, in their dtype."""

    unembed = staticmethod(F.linear)
    cross_entropy = None  # tensor parallelism has one of its own, in parts of the vocabulary

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor]):
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(config.vocab_size, config.dim)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = nn.RMSNorm(config.dim, config.norm_eps)
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.load_state_dict(weights, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of tokens; of a pipeline stage, what its part of the model makes of what the one before made."""
        if self.embedding is not None:
            x = self.embedding(x)
        x = self.run(x, self.blocks.children(), x.shape[1])
        return x if self.head is None else self.head(self.norm(x))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return mean_cross_entropy(self(tokens_BT), targets_BT)

    def ends(self) -> tuple[list[str], list[str]]:
        """The children that `enter` and `leave` use."""
        return ["embedding"], ["norm", "head"]

    def enter(self, tokens_BT: Tensor) -> Tensor:
        return self.embedding(tokens_BT)

    def run(self, x_BTD: Tensor, blocks: Iterable[nn.Module], sequence_length: int) -> Tensor:
        for block in blocks:
            x_BTD = block(x_BTD)
        return x_BTD

    def leave(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        hidden = self.norm(x_BTD)
        if self.cross_entropy is not None:
            return self.cross_entropy(hidden, self.head.weight, targets_BT)
        return mean_cross_entropy(self.head(hidden), targets_BT)
