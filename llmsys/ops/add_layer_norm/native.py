"""Residual addition and LayerNorm on native kernels, in one pass."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import Kernels
from llmsys.ops._op import Impl
from llmsys.ops.layer_norm.native import backward_on, forward_on


def implementation(kernels: Kernels) -> Impl:
    """add_layer_norm on `kernels`: the LayerNorm kernels with a residual."""
    run, run_backward = forward_on(kernels), backward_on(kernels)

    def forward(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        y, sum_ = out or [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
        rows = x.numel() // x.shape[-1]
        mean, rstd = kernels.floats(rows, like=x), kernels.floats(rows, like=x)
        run(x, residual, weight, bias, eps, y, sum_, mean, rstd)
        return y, sum_, mean, rstd

    def backward(
        dy: torch.Tensor,
        dsum: torch.Tensor | None,
        sum: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        eps: float,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return run_backward(dy, dsum, sum, weight, bias, mean, rstd, out)

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
