"""Llama: grouped-query attention, rotary positions, SwiGLU, RMSNorm, with a tied or a separate head.

Legend of name suffixes: B batch, T tokens, D model, H heads, K head dim, V vocabulary.
Source     Touvron et al. 2023, arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al. 2023, arXiv:2305.13245
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import cast

from torch import Tensor, nn

from llmsys.models.decoder import Decoder, check_sizes
from llmsys.nn import MLP, RMSNorm
from llmsys.ops import attention, rope_qk, rope_tables

PLAN = {
    "tensor": {
        "embedding": "vocab",
        "head": "vocab",
        "*.wq": "heads",
        "*.wk": "heads",
        "*.wv": "heads",
        "*.wo": "row",
        "*.gate": "column",
        "*.up": "column",
        "*.down": "row",
    },
    "stages": "blocks",
    "recompute": ["*.attention"],  # where it is selective: what attention keeps is cheaper to make again than an MLP's
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama. `max_sequence_length` is the longest sequence it is trained for, and accepts."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    max_sequence_length: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_head: bool = False

    def __post_init__(self):
        check_sizes(self, fields(self))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"llmsys.models.LlamaConfig: num_heads={self.num_heads} with num_kv_heads={self.num_kv_heads}, "
                "expected a multiple of num_kv_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"llmsys.models.LlamaConfig: head_dim={self.head_dim}, expected an even number")

    def num_parameters(self) -> int:
        """How many parameters the model has, a tied head counted once."""
        norms = (2 * self.num_layers + 1) * self.dim
        embedding = 0 if self.tied_head else self.vocab_size * self.dim
        return self._num_matmul_parameters() + embedding + norms

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to train on one token: forward and backward, nothing computed twice.

        6 per parameter of a matrix product (the embedding look-up is none, the head is one even where it is tied),
        and 12·L·H·K·T/2 for the two products of attention, halved because half of the scores are masked.
        Source     Chowdhery et al. 2022, arXiv:2204.02311, appendix B, which does not halve
        """
        attention = 6 * self.num_layers * self.num_heads * self.head_dim * sequence_length
        return 6 * self._num_matmul_parameters() + attention

    def _num_matmul_parameters(self) -> int:
        attention = 2 * self.dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.dim * self.hidden_dim) + self.vocab_size * self.dim


SIZES = {
    "demo": LlamaConfig(
        vocab_size=4096, dim=192, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=48, hidden_dim=512,
        max_sequence_length=256, tied_head=True,
    ),
    "62M": LlamaConfig(
        vocab_size=32_000, dim=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, hidden_dim=1856,
    ),
    # TinyLlama 1.1B: Zhang et al. 2024, arXiv:2401.02385, table 1
    "1B": LlamaConfig(
        vocab_size=32_000, dim=2048, num_layers=22, num_heads=32, num_kv_heads=4, head_dim=64, hidden_dim=5632,
    ),
    # Llama 3: Grattafiori et al. 2024, arXiv:2407.21783, table 3
    "8B": LlamaConfig(
        vocab_size=128_256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, hidden_dim=14_336,
        max_sequence_length=8192, rope_theta=500_000.0,
    ),
    "70B": LlamaConfig(
        vocab_size=128_256, dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, hidden_dim=28_672,
        max_sequence_length=8192, rope_theta=500_000.0,
    ),
}  # fmt: skip


class Attention(nn.Module):
    """Causal self-attention; each key-value head serves num_heads / num_kv_heads query heads."""

    rotate = staticmethod(rope_qk)
    attend = staticmethod(attention)

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q_BTHK, k_BTHK = self.rotate(q_BTHK, k_BTHK, cos, sin)
        y_BTHK = cast(Tensor, self.attend(q_BTHK, k_BTHK, v_BTHK, causal=True))
        return self.wo(y_BTHK.flatten(-2))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.hidden_dim)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attended = self.attention(self.attention_norm(x_BTD), cos, sin)
        normed, x_BTD = self.mlp_norm(attended, x_BTD)
        return x_BTD + self.mlp(normed)


class Llama(Decoder):
    """The whole model."""

    config: LlamaConfig

    def build(self, config: LlamaConfig) -> None:
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.dim, config.vocab_size, bias=False)

    def ends(self) -> tuple[list[str], list[str]]:
        return ["embedding"], ["norm", "embedding" if self.head is None else "head"]

    def enter(self, tokens_BT: Tensor) -> Tensor:
        self.check_length(tokens_BT)
        return self.embedding(tokens_BT)

    def run(self, x_BTD: Tensor, blocks: Iterable[nn.Module], sequence_length: int) -> Tensor:
        cos, sin = rope_tables(sequence_length, self.config.head_dim, base=self.config.rope_theta, device=x_BTD.device)
        for block in blocks:
            x_BTD = block(x_BTD, cos, sin)
        return x_BTD
