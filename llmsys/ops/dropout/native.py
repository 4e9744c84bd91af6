"""Dropout on native kernels. There is one for the CPU only."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, rows_of
from llmsys.ops._op import Impl
from llmsys.ops.dropout.reference import threshold_and_scale


def implementation(kernels: Kernels) -> Impl:
    """Dropout on `kernels`."""
    launch = kernels.launch("dropout")

    def forward(x: torch.Tensor, p: float, seed: int, offset: int, out: torch.Tensor | None = None) -> torch.Tensor:
        x, x_stride = rows_of(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        threshold, scale = threshold_and_scale(p)
        if threshold == 2**32:  # no word is as large
            return y.zero_()
        dim = x.shape[-1]
        rows = x.numel() // dim if dim else 0
        launch(x.data_ptr(), y.data_ptr(), rows, dim, x_stride, seed, offset, threshold, scale, DTYPES[x.dtype])
        return y

    return Impl(kernels.name, forward, forward, kernels.why_not, (kernels.device,))


CPU: Impl = implementation(_native.CPU)
