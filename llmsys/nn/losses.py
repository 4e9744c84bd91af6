"""Drop-ins for torch's loss modules."""

import torch
from torch import Tensor

from llmsys.ops.cross_entropy import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`llmsys.cross_entropy`; `isinstance` of torch's holds.

    Shapes     input (V,), (N, V) or (N, V, d1, …), target of the same shape without V, int64 → as torch's, in float32
               (float64 for float64)
    Errors     TypeError for targets that are probabilities; torch.nn.CrossEntropyLoss takes them
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            raise TypeError(
                f"llmsys.nn.CrossEntropyLoss: target is {target.dtype}, expected class indices in int64; "
                "torch.nn.CrossEntropyLoss takes probabilities"
            )
        loss = cross_entropy(
            input if input.dim() < 2 else input.movedim(1, -1),
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        assert isinstance(loss, Tensor)  # without return_lse
        return loss
