"""Residual addition and RMSNorm in one pass, by the kernels of `rms_norm`."""

from torch import Tensor

from llmsys.ops._triton import empty_like
from llmsys.ops.rms_norm.triton_kernels import launch_backward, launch_forward


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    y, sum = (empty_like(x), empty_like(x)) if out is None else out
    return y, sum, launch_forward(x, residual, weight, eps, weight_offset, sum, y)


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dx = empty_like(sum) if out is None else out
    return dx, launch_backward(dy, dsum, sum, weight, rstd, weight_offset, dx)
