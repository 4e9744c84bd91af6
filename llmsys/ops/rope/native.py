"""Rotary position embedding on native kernels. There is one for the CPU only."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """Rotary position embedding on `kernels`."""
    if not kernels.name.startswith("cpu"):
        kernels = replace(kernels, module=None, missing="rope has no CUDA kernel")
    launch = kernels.launch("rope")

    def run(
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        out: torch.Tensor | None,
        inverse: bool,
    ) -> torch.Tensor:
        x = with_whole_rows(x)
        cos, sin = with_whole_rows(cos.float()), with_whole_rows(sin.float())
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        launch(
            *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), *x.shape, 2 * cos.shape[-1]),
            *(*x.stride()[:-1], *table_strides(cos), interleaved, inverse, DTYPES[x.dtype]),
        )
        return y

    def forward(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return run(x, cos, sin, interleaved, out, False)

    def backward(
        dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return run(dy, cos, sin, interleaved, out, True)

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


def with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied unless the elements of its last dimension lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def table_strides(table: torch.Tensor) -> tuple[int, int]:
    """The distances between the rows of two sequences and of two tokens."""
    return (0, table.stride(0)) if table.dim() == 2 else (table.stride(0), table.stride(1))


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
