"""Dropout whose mask is computed again instead of kept."""

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
        return dropout(x, self.p, seed=_drawn_seed())


def _drawn_seed() -> int:
    return int(torch.randint(2**63 - 1, (), device="cpu"))


# A compiled randint has numbers of its own. This is the mark that torch.compiler.disable leaves; the decorator itself
# would import the compiler with the library.
_drawn_seed._torchdynamo_disable = True  # type: ignore[attr-defined]
