"""A product with a parameter, whose gradient can be put off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsys.ops import linear


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as `llmsys.linear`, which `llmsys.ops.deferred` knows."""
    if torch.is_autocast_enabled(x.device.type):  # which casts the weight: no gradient of it can wait
        return F.linear(x, weight, bias)
    return linear(x, weight, bias)
