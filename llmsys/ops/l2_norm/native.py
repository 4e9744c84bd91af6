"""Rows of length one on native kernels. There is one for the CPU only."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, grouped_rows
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """l2_norm on `kernels`."""
    if not kernels.name.startswith("cpu"):
        kernels = replace(kernels, module=None, missing="l2_norm has no CUDA kernel")
    launch, launch_backward = kernels.launch("l2_norm_forward"), kernels.launch("l2_norm_backward")

    def run(x: torch.Tensor, eps: float, out: torch.Tensor | None, length: int) -> torch.Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        inner, (x, *strides) = grouped_rows(x)
        rows, dim = num_rows(x), x.shape[-1]
        launch(x.data_ptr(), y.data_ptr(), length, rows, dim, inner, *strides, eps, DTYPES[x.dtype])
        return y

    def infer(x: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
        return run(x, eps, out, 0)

    def forward(x: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        length = kernels.floats(num_rows(x), like=x)
        return run(x, eps, out, length.data_ptr()), length

    def backward(
        dy: torch.Tensor, x: torch.Tensor, length: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        inner, (dy, *dy_strides), (x, *x_strides) = grouped_rows(dy, x)
        length = length.contiguous()
        launch_backward(
            *(dy.data_ptr(), x.data_ptr(), length.data_ptr(), dx.data_ptr(), length.numel(), x.shape[-1]),
            *(inner, *dy_strides, *x_strides, eps, DTYPES[x.dtype]),
        )
        return dx

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,), infer)


def num_rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
