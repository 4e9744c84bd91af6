"""Softmax of rows on native kernels. There is one for the CPU only."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, grouped_rows
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """softmax on `kernels`."""
    launch, launch_backward = kernels.launch("softmax_forward"), kernels.launch("softmax_backward")

    def forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        inner, (x, *strides) = grouped_rows(x)
        launch(x.data_ptr(), y.data_ptr(), num_rows(x), x.shape[-1], inner, *strides, DTYPES[x.dtype])
        return y

    def backward(dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        dx = torch.empty_like(y, memory_format=torch.contiguous_format) if out is None else out
        inner, (dy, *dy_strides), (y, *y_strides) = grouped_rows(dy, y)
        launch_backward(
            *(dy.data_ptr(), y.data_ptr(), dx.data_ptr(), num_rows(y), y.shape[-1]),
            *(inner, *dy_strides, *y_strides, DTYPES[y.dtype]),
        )
        return dx

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


def num_rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


CPU: Impl = implementation(_native.CPU)
