"""LayerNorm on native kernels, with and without a residual."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, grouped_rows
from llmsys.ops._op import Impl
from llmsys.ops.rms_norm.native import chunks_of


def implementation(kernels: Kernels) -> Impl:
    """LayerNorm on `kernels`."""
    run, run_backward = forward_on(kernels), backward_on(kernels)

    def infer(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        run(x, None, weight, bias, eps, y, None, None, None)
        return y

    def forward(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        rows = x.numel() // x.shape[-1]
        mean, rstd = kernels.floats(rows, like=x), kernels.floats(rows, like=x)
        run(x, None, weight, bias, eps, y, None, mean, rstd)
        return y, mean, rstd

    def backward(
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        eps: float,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return run_backward(dy, None, x, weight, bias, mean, rstd, out)

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,), infer)


def forward_on(kernels: Kernels) -> Callable[..., None]:
    """The forward that LayerNorm with and without a residual share: it fills y, and sum, mean, rstd where given."""
    launch = kernels.launch("layer_norm_forward")

    def run(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        y: torch.Tensor,
        sum: torch.Tensor | None,
        mean: torch.Tensor | None,
        rstd: torch.Tensor | None,
    ) -> None:
        inner, (x, *x_strides), (residual, *residual_strides) = grouped_rows(x, residual)
        weight, bias = contiguous(weight), contiguous(bias)
        dim = x.shape[-1]
        launch(
            *(x.data_ptr(), address(residual), address(weight), address(bias), address(sum), y.data_ptr()),
            *(address(mean), address(rstd), x.numel() // dim, dim, inner, *x_strides, *residual_strides, eps),
            *(DTYPES[x.dtype], weight_type(x, weight, bias)),
        )

    return run


def backward_on(kernels: Kernels) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """The backward that LayerNorm with and without a residual share."""
    launch = kernels.launch("layer_norm_backward")

    def run(
        dy: torch.Tensor,
        dsum: torch.Tensor | None,
        s: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        dx = torch.empty_like(s, memory_format=torch.contiguous_format) if out is None else out
        inner, (dy, *dy_strides), (dsum, *dsum_strides), (s, *s_strides) = grouped_rows(dy, dsum, s)
        weight, bias, mean, rstd = contiguous(weight), contiguous(bias), mean.contiguous(), rstd.contiguous()
        rows, dim = rstd.numel(), s.shape[-1]
        chunks = chunks_of(rows, s.device)
        # For the parameters that are there: a gradient, and room for its sums of each chunk.
        parameters = (weight, bias)
        dweight, dbias = (None if p is None else torch.empty_like(p) for p in parameters)
        dweight_parts, dbias_parts = (None if p is None else kernels.floats(chunks, dim, like=s) for p in parameters)
        launch(
            *(dy.data_ptr(), address(dsum), s.data_ptr(), address(weight), mean.data_ptr(), rstd.data_ptr()),
            *(dx.data_ptr(), address(dweight), address(dbias), address(dweight_parts), address(dbias_parts)),
            *(rows, dim, chunks, inner, *dy_strides, *dsum_strides, *s_strides),
            *(DTYPES[s.dtype], weight_type(s, weight, bias)),
        )
        return dx, dweight, dbias

    return run


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def weight_type(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> int:
    """The element type that weight and bias share; where there are none, x's, which no kernel then looks at."""
    like = weight if weight is not None else bias if bias is not None else x
    return DTYPES[like.dtype]


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
