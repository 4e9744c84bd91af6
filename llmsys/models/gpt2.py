"""GPT-2: multi-head attention, learned positions, GELU, LayerNorm, biases everywhere, the head tied to the embedding.

Legend of name suffixes: B batch, T tokens, D model, H heads, K head dim, V vocabulary.
Source     Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from llmsys.models.decoder import Decoder, check_sizes
from llmsys.nn import FusedLinear, LayerNorm, Linear
from llmsys.ops import attention, gelu

PLAN = {
    "tensor": {
        "embedding": "vocab",
        "positions": "sequence",
        "*.wqkv": "heads",
        "*.wo": "row",
        "*.up": "column",
        "*.down": "row",
    },
    "stages": "blocks",
    "recompute": ["*.attention"],
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The shape of a GPT-2. It has `max_sequence_length` positions, and accepts no more tokens."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    max_sequence_length: int = 1024
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_sizes(self, fields(self))
        if self.dim % self.num_heads:
            raise ValueError(
                f"llmsys.models.GPT2Config: dim={self.dim} with num_heads={self.num_heads}, expected a multiple of "
                "num_heads"
            )

    def num_parameters(self) -> int:
        """How many parameters the model has, the head's counted with the embedding."""
        vectors = (2 * 2 + 3 + 1 + 4 + 1) * self.num_layers * self.dim + 2 * self.dim
        return self._num_matmul_parameters() + self.max_sequence_length * self.dim + vectors

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to train on one token, counted as `LlamaConfig.flops_per_token` does."""
        return 6 * self._num_matmul_parameters() + 6 * self.num_layers * self.dim * sequence_length

    def _num_matmul_parameters(self) -> int:
        return self.num_layers * 12 * self.dim**2 + self.vocab_size * self.dim


SIZES = {
    "124M": GPT2Config(vocab_size=50_257, dim=768, num_layers=12, num_heads=12),
    "355M": GPT2Config(vocab_size=50_257, dim=1024, num_layers=24, num_heads=16),
    "774M": GPT2Config(vocab_size=50_257, dim=1280, num_layers=36, num_heads=20),
    "1558M": GPT2Config(vocab_size=50_257, dim=1600, num_layers=48, num_heads=25),
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.wqkv = FusedLinear(config.dim, (config.dim, config.dim, config.dim))
        self.wo = Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x_BTD))
        y_BTHK = cast(Tensor, attention(q_BTHK, k_BTHK, v_BTHK, causal=True))
        return self.wo(y_BTHK.flatten(-2))


class MLP(nn.Module):
    tokenwise = True  # each token's result is of that token alone

    def __init__(self, dim: int):
        super().__init__()
        self.up = Linear(dim, 4 * dim)
        self.down = Linear(4 * dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.attention_norm = LayerNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        normed, x_BTD = self.mlp_norm(self.attention(self.attention_norm(x_BTD)), x_BTD)
        return x_BTD + self.mlp(normed)


class GPT2(Decoder):
    """The whole model."""

    config: GPT2Config

    def build(self, config: GPT2Config) -> None:
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_sequence_length, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.head = None

    def ends(self) -> tuple[list[str], list[str]]:
        return ["embedding", "positions"], ["norm", "embedding"]

    def enter(self, tokens_BT: Tensor) -> Tensor:
        self.check_length(tokens_BT)
        return self.embedding(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[-1], device=tokens_BT.device))

    def run(self, x_BTD: Tensor, blocks: Iterable[nn.Module], sequence_length: int) -> Tensor:
        for block in blocks:
            x_BTD = block(x_BTD)
        return x_BTD
