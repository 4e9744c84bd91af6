"""Cross entropy on native kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, rows_of
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """Cross entropy on `kernels`."""
    launch_forward = kernels.launch("cross_entropy_forward")
    launch_backward = kernels.launch("cross_entropy_backward")

    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        (logits, stride), target, weight = rows_of(logits), target.contiguous(), _float32(weight)
        if out is None:
            out = kernels.floats(*target.shape, like=logits), kernels.floats(*target.shape, like=logits)
        loss, lse = out
        launch_forward(
            *(logits.data_ptr(), target.data_ptr(), _address(weight), 0, loss.data_ptr(), lse.data_ptr(), 0),
            *(target.numel(), logits.shape[-1], stride, 0),
            *(ignore_index, label_smoothing, z_loss, softcap, DTYPES[logits.dtype]),
        )
        return loss, lse

    def backward(
        dloss: Tensor,
        dlse: Tensor | None,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        lse: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        out: Tensor | None = None,
    ) -> Tensor:
        (logits, stride), target, weight = rows_of(logits), target.contiguous(), _float32(weight)
        dloss, lse, dlse = dloss.contiguous(), lse.contiguous(), None if dlse is None else dlse.contiguous()
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
        classes = logits.shape[-1]
        launch_backward(
            *(dloss.data_ptr(), _address(dlse), logits.data_ptr(), target.data_ptr(), _address(weight)),
            *(lse.data_ptr(), dlogits.data_ptr(), target.numel(), classes, stride, classes),
            *(ignore_index, label_smoothing, z_loss, softcap, DTYPES[logits.dtype]),
        )
        return dlogits

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


def with_gradient(kernels: Kernels) -> Callable:
    """The function that turns logits into their gradient where they lie, while each row is in a core's cache."""
    launch = kernels.launch("cross_entropy_forward")

    def run(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
    ) -> Tensor:
        """The loss (N,) of each row; logits (N, V), of strides (any, 1), become the gradient of Σ scale · loss."""
        target, weight, scale = target.contiguous(), _float32(weight), scale.contiguous()
        loss, lse = kernels.floats(*target.shape, like=logits), kernels.floats(*target.shape, like=logits)
        (rows, classes), stride = logits.shape, logits.stride(0)
        launch(
            *(logits.data_ptr(), target.data_ptr(), _address(weight), scale.data_ptr(), loss.data_ptr()),
            *(lse.data_ptr(), logits.data_ptr(), rows, classes, stride, stride),
            *(ignore_index, label_smoothing, z_loss, softcap, DTYPES[logits.dtype]),
        )
        return loss

    return run


def _float32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
