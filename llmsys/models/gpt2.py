"""GPT-2: multi-head attention, learned positions, GELU, LayerNorm, biases everywhere, the head tied to the embedding.

Legend of name suffixes: B batch, T tokens, D model, H heads, K head dim, V vocabulary.
Source     Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from llmsys.models.decoder import Decoder, check_sizes
from llmsys.models.dropout import PlacedDropout, derived
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
    """The shape of a GPT-2. It has `max_sequence_length` positions, and accepts no more tokens.

    dropout    probability, in training: of the embedding, of what attention looks at, and of both residual branches
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    max_sequence_length: int = 1024
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self):
        check_sizes(self, [field for field in fields(self) if field.name != "dropout"])
        if not 0 <= self.dropout < 1:
            raise ValueError(f"llmsys.models.GPT2Config: dropout={self.dropout}, expected a probability below 1")
        if self.dim % self.num_heads:
            raise ValueError(
                f"llmsys.models.GPT2Config: dim={self.dim} with num_heads={self.num_heads}, expected a multiple of "
                "num_heads"
            )

    def num_parameters(self) -> int:
        """How many parameters the model has, the head's counted with the embedding."""
        vectors = (4 + 9) * self.num_layers * self.dim + 2 * self.dim  # norms, and the biases of four layers
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
    """Causal self-attention. `first_head` is the number of the first head that is here; who cuts heads says it."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.head_dim, self.first_head = config.dim // config.num_heads, 0
        self.wqkv = FusedLinear(config.dim, (config.dim, config.dim, config.dim))
        self.wo = Linear(config.dim, config.dim)
        self.dropout = PlacedDropout(config.dropout)

    def forward(self, x_BTD: Tensor, key: int | None = None) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x_BTD))
        return self.wo(self.attend(q_BTHK, k_BTHK, v_BTHK, key).flatten(-2))

    def attend(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, key: int | None) -> Tensor:
        """With dropout head by head: the op numbers the heads that it is given, and a rank has some of them."""
        if key is None:
            return cast(Tensor, attention(q_BTHK, k_BTHK, v_BTHK, causal=True))
        heads = zip(*(x.split(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK)), strict=True)
        seeds = (derived(key, self.dropout.name, head) for head in itertools.count(self.first_head))
        return torch.cat(
            [
                cast(Tensor, attention(q, k, v, causal=True, dropout_p=self.dropout.p, seed=seed))
                for (q, k, v), seed in zip(heads, seeds, strict=False)
            ],
            2,
        )


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
        self.attention_dropout = PlacedDropout(config.dropout)
        self.mlp_norm = LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim)
        self.mlp_dropout = PlacedDropout(config.dropout)

    def forward(self, x_BTD: Tensor, key: int | None = None) -> Tensor:
        attended = self.attention_dropout(self.attention(self.attention_norm(x_BTD), key), key)
        normed, x_BTD = self.mlp_norm(attended, x_BTD)
        return x_BTD + self.mlp_dropout(self.mlp(normed), key)


class GPT2(Decoder):
    """The whole model. With dropout, `at(step, micro)` comes before each forward of training."""

    config: GPT2Config

    def build(self, config: GPT2Config) -> None:
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_sequence_length, config.dim)
        self.dropout = PlacedDropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.head = None

    def ends(self) -> tuple[list[str], list[str]]:
        return ["embedding", "positions", "dropout"], ["norm", "embedding"]

    def enter(self, tokens_BT: Tensor) -> Tensor:
        self.check_length(tokens_BT)
        positions_TD = self.positions(torch.arange(tokens_BT.shape[-1], device=tokens_BT.device))
        return self.dropout(self.embedding(tokens_BT) + positions_TD, self.key())

    def run(self, x_BTD: Tensor, blocks: Iterable[nn.Module], sequence_length: int) -> Tensor:
        key, self._key = self.key(), None  # it is said for each forward
        for block in blocks:
            x_BTD = block(x_BTD, key)
        return x_BTD
