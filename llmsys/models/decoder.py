"""What models that predict the next token have in common, and how their weights start.

Legend of name suffixes: B batch, T tokens, D model, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmsys.models.dropout import PlacedDropout, derived
from llmsys.ops import linear_cross_entropy


class Cut(Protocol):
    """The part of a weight that is held, as `llmsys.parallel.tensor` cuts it."""

    def of(self, whole: Any) -> Tensor: ...

    def whole_shape(self, part: torch.Size) -> tuple[int, ...]: ...


class Decoder(nn.Module):
    """A model of `embedding`, `blocks`, `norm` and a head. Its weights depend on `seed` and their names alone, whatever
    the device, the dtype or the layout.

    On the meta device (`with torch.device("meta")`) it holds shapes only; `to_empty` and `initialise` fill it. A
    subclass makes its modules in `build`, and says what `enter` and `run` do.
    """

    unembed = staticmethod(F.linear)
    cross_entropy = staticmethod(linear_cross_entropy)
    config: Any
    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear | None  # None: the embedding's weight

    def __init__(
        self,
        config: Any,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config, self.seed = config, seed
        self._key: int | None = None
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.device("meta"):
            self.build(config)
        for name, module in self.named_modules():
            if isinstance(module, PlacedDropout):
                module.name = name
        self.to(dtype)
        if device.type != "meta":
            self.to_empty(device=device).initialise(seed)

    def build(self, config: Any) -> None:
        raise NotImplementedError

    def enter(self, tokens_BT: Tensor) -> Tensor:
        """What the first block is given, (B, T, D)."""
        raise NotImplementedError

    def run(self, x_BTD: Tensor, blocks: Iterable[nn.Module], sequence_length: int) -> Tensor:
        """`x_BTD` through some of the blocks."""
        raise NotImplementedError

    def ends(self) -> tuple[list[str], list[str]]:
        """The children that `enter` and `leave` use; a pipeline's stages in between have neither."""
        raise NotImplementedError

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens_BT`, integers in [0, V)."""
        return self.unembed(self.hidden(tokens_BT), self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """(V, D), of the embedding where the head is tied to it."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """What the head multiplies, (B, T, D)."""
        return self.norm(self.run(self.enter(tokens_BT), self.blocks, tokens_BT.shape[-1]))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats, in float32; targets of -100 do not count. No logits are kept."""
        return self.leave(self.run(self.enter(tokens_BT), self.blocks, tokens_BT.shape[-1]), targets_BT)

    def leave(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss, of what the last block gives."""
        return self.cross_entropy(self.norm(x_BTD), self.head_weight, targets_BT)

    def at(self, step: int, micro: int = 0) -> None:
        """Say which forward of training comes next: what dropout drops is a function of (seed, step, micro)."""
        self._key = derived(self.seed, step, micro)

    def key(self) -> int | None:
        """What dropout draws from in this forward; None where nothing is dropped.

        Errors     RuntimeError if `at` was not called: every step would drop the same
        """
        if not self.training or not getattr(self.config, "dropout", 0.0):
            return None
        if self._key is None:
            raise RuntimeError(
                f"llmsys.models.{type(self).__name__}: a forward with dropout={self.config.dropout} in training, "
                "expected `at(step, micro)` before each; or use eval()"
            )
        return self._key

    def check_length(self, tokens_BT: Tensor) -> None:
        if tokens_BT.shape[-1] > self.config.max_sequence_length:
            raise ValueError(
                f"llmsys.models.{type(self).__name__}: a sequence of {tokens_BT.shape[-1]} tokens, expected at most "
                f"max_sequence_length={self.config.max_sequence_length}"
            )

    @torch.no_grad()
    def initialise(
        self, seed: int, cut: Mapping[str, Cut] | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fill every weight from (seed, name): normal of deviation 0.02, over √(2·num_layers) before a residual sum.

        Biases are 0 and the weights of norms 1. `cut` says, by name, which parameters are a part of the model's: they
        get that part of what the whole would get. One whole weight at a time exists.

        weights    those to fill, by name, instead of the parameters that there are

        Source     Radford et al. 2019 (GPT-2), section 2.3
        """
        self.seed, cut = seed, cut or {}
        for name, weight in (dict(self.named_parameters()) if weights is None else weights).items():
            if name.endswith("bias") or weight.dim() == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name in cut:
                weight.copy_(cut[name].of(self._drawn(seed, name, cut[name].whole_shape(weight.shape))))
            else:
                weight.copy_(self._drawn(seed, name, weight.shape))

    def _drawn(self, seed: int, name: str, shape: Sequence[int]) -> Tensor:
        std = 0.02
        if name.endswith(("wo.weight", "down.weight")):
            std /= math.sqrt(2 * self.config.num_layers)
        generator = torch.Generator().manual_seed(derived(seed, name))
        return torch.empty(tuple(shape), dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def check_sizes(config: Any, fields: Iterable[Any]) -> None:
    """Errors     ValueError for a number among `fields` of `config` that is not above 0"""
    for field in fields:
        value = getattr(config, field.name)
        if field.type in (int, float) and not value > 0:
            raise ValueError(f"llmsys.models.{type(config).__name__}: {field.name}={value}, expected a number above 0")
