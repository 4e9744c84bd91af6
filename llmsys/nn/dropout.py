"""Dropout whose mask is computed again instead of kept."""

import sys

import torch
from torch import Tensor

from llmsys.ops.dropout import dropout


class Dropout(torch.nn.Dropout):
    """A drop-in for `torch.nn.Dropout`, with the masks of `llmsys.dropout` instead of torch's.

    Each call in training draws its seed from torch's generator of the CPU, on every device alike: `torch.manual_seed`
    repeats a run, and recomputation (`torch.utils.checkpoint`) repeats the masks.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False):
        if inplace:
            raise ValueError("llmsys.nn.Dropout: inplace is True, expected False: it has no form that overwrites x")
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return dropout(x, self.p, seed=drawn_seed())


def drawn_seed() -> int:
    """A seed from torch's generator of the CPU, also where a graph is compiled."""
    # A compiled randint has numbers of its own. Where no compiler is loaded none is at work, and it stays unloaded.
    draw = torch.compiler.disable(_draw) if "torch._dynamo" in sys.modules else _draw
    return draw()


def _draw() -> int:
    return int(torch.randint(2**63 - 1, (), device="cpu"))


# The mark that torch.compiler.disable leaves: a graph breaks here.
drawn_seed._torchdynamo_disable = True  # type: ignore[attr-defined]
