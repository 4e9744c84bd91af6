"""Embedding on native kernels. There is one for the CPU only."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, rows_of
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """Embedding on `kernels`, which raise IndexError themselves."""
    launch, launch_backward = kernels.launch("embedding_forward"), kernels.launch("embedding_backward")

    def forward(
        weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight, weight_stride = rows_of(weight)
        numbers, (rows, dim) = int64(ids), weight.shape
        y = torch.empty((*ids.shape, dim), dtype=weight.dtype) if out is None else out
        launch(
            *(numbers.data_ptr(), weight.data_ptr(), y.data_ptr()),
            *(ids.numel(), rows, dim, weight_stride, DTYPES[weight.dtype]),
        )
        return y

    def backward(
        dy: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        padding_idx: int | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dy, dy_stride = rows_of(dy)
        numbers, (rows, dim) = int64(ids), weight.shape
        dweight = torch.empty((rows, dim), dtype=weight.dtype) if out is None else out
        scratch = torch.empty(rows + 1 + ids.numel(), dtype=torch.int64)
        starts = scratch.data_ptr()
        launch_backward(
            *(numbers.data_ptr(), dy.data_ptr(), dweight.data_ptr(), starts, starts + 8 * (rows + 1)),
            *(ids.numel(), rows, dim, dy_stride, -1 if padding_idx is None else padding_idx, DTYPES[dy.dtype]),
        )
        return dweight

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


def int64(ids: torch.Tensor) -> torch.Tensor:
    """`ids` as the kernels read them."""
    return ids.to(torch.int64).contiguous()


CPU: Impl = implementation(_native.CPU)
