"""Cross entropy as the chunk engine wants a loss: rows of logits in, their gradient left where they lie."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llmsys.ops import _native
from llmsys.ops.cross_entropy import OP, native

_FUSED = {kernels.name: native.with_gradient(kernels) for kernels in (_native.CPU, _native.CUDA)}


@dataclass(frozen=True)
class CrossEntropy:
    """`llmsys.cross_entropy` of each row, with its options. `target` (N,) is of all rows."""

    target: Tensor
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0

    def __call__(self, logits: Tensor, rows: slice, scale: Tensor | None) -> Tensor:
        target, *options = (getattr(self, field.name) for field in fields(self))
        args = (logits, target[rows], *options)
        implementation = OP.select(*args)
        if scale is None:
            return implementation.forward(*args)[0]
        if implementation.name in _FUSED:
            return _FUSED[implementation.name](logits, target[rows], self.weight, scale, *options[1:])
        loss, lse = implementation.forward(*args)
        assert implementation.backward is not None
        implementation.backward(scale, None, logits, target[rows], self.weight, lse, *options[1:], out=logits)
        return loss

    def row_weights(self, dtype: torch.dtype) -> Tensor:
        """w[t] of each row, 0 of those that are ignored: what a mean divides by the sum of."""
        counts = self.target != self.ignore_index
        if self.weight is None:
            return counts.to(dtype)
        index = self.target.clamp(0, self.weight.shape[0] - 1)
        return self.weight.to(dtype)[index].where(counts, 0.0)
