"""Cross entropy as the chunk engine wants a loss: rows of logits in, their gradient left where they lie."""

from __future__ import annotations

from dataclasses import dataclass, fields

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
