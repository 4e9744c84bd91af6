"""Linear on native kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmsys.ops import _matmul, _native
from llmsys.ops._native import DTYPES, Kernels, matrix_of, rows_of
from llmsys.ops._op import Impl
from llmsys.ops.linear import torch_gemm
from llmsys.ops.sink import Product

ACTIVATIONS = {None: 0, "relu": 1, "relu2": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5}  # csrc/activation.h


def implementation(kernels: Kernels) -> Impl:
    """Linear on `kernels`."""
    matmul = _matmul.implementation(kernels)
    launch, launch_backward = kernels.launch("linear_forward"), kernels.launch("linear_backward")

    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        residual: torch.Tensor | None,
        out: torch.Tensor | None = None,
        keep_pre: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cols, depth = weight.shape
        rows = x.shape[:-1].numel()
        y = torch.empty((*x.shape[:-1], cols), dtype=x.dtype) if out is None else out
        pre = torch.empty_like(y) if keep_pre and activation is not None else torch.empty(0, dtype=x.dtype)
        x, *x_strides = matrix_of(x)
        weight, *weight_strides = matrix_of(weight)
        bias = None if bias is None else bias.contiguous()
        residual, residual_stride = (None, 0) if residual is None else rows_of(residual)
        launch(
            *(x.data_ptr(), weight.data_ptr(), _address(bias), _address(residual), y.data_ptr(), _address(pre)),
            *(rows, cols, depth, *x_strides, *weight_strides, residual_stride),
            *(ACTIVATIONS[activation], DTYPES[x.dtype]),
        )
        return y, pre

    def infer(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        residual: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return forward(x, weight, bias, activation, residual, out, keep_pre=False)[0]

    def backward(*args: Any, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dx, dweight, dbias)."""
        results, _ = run_backward(*args, out=out)
        return results

    def backward_in_parts(
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pre: torch.Tensor,
        activation: str | None,
        needs_dx: bool,
        needs_dweight: bool,
        needs_dbias: bool,
    ) -> tuple[tuple[torch.Tensor, ...], Callable[[], tuple[torch.Tensor | Product, ...]]]:
        """(dx, nothing, dbias), and what gives (nothing, dweight, nothing)."""
        results, dz = run_backward(dy, x, weight, bias, pre, activation, needs_dx, False, needs_dbias)
        nothing = torch.empty(0, dtype=x.dtype)
        dweight = Product(matmul, dz.t(), _matmul.rows(x)) if needs_dweight else nothing
        return results, lambda: (nothing, dweight, nothing)

    def run_backward(
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pre: torch.Tensor,
        activation: str | None,
        needs_dx: bool,
        needs_dweight: bool,
        needs_dbias: bool,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """(dx, dweight, dbias), and the gradient before the activation, as a matrix."""
        cols, depth = weight.shape
        rows = x.shape[:-1].numel()

        def room(needed: bool, *shape: int) -> torch.Tensor:
            return torch.empty(shape if needed else (0,), dtype=x.dtype)

        dx = room(needs_dx, *x.shape) if out is None or not needs_dx else out
        dweight, dbias = room(needs_dweight, cols, depth), room(needs_dbias, cols)
        dz = torch.empty(rows, cols, dtype=x.dtype) if activation is not None else _matmul.rows(dy)
        if activation is not None or needs_dbias:
            dy, row_stride = rows_of(dy)
            dy_strides = [row_stride, 1]
        else:
            dy, *dy_strides = matrix_of(dy)
        x, *x_strides = matrix_of(x)
        weight, *weight_strides = matrix_of(weight)
        launch_backward(
            *(dy.data_ptr(), x.data_ptr(), weight.data_ptr(), _address(pre), _address(dz)),
            *(dx.data_ptr() if needs_dx else 0, dweight.data_ptr() if needs_dweight else 0),
            *(dbias.data_ptr() if needs_dbias else 0, rows, cols, depth, *dy_strides, *x_strides, *weight_strides),
            *(ACTIVATIONS[activation], DTYPES[x.dtype]),
        )
        return (dx, dweight, dbias), dz

    def why_slower(x: torch.Tensor, weight: object, bias: object, activation: str | None, *args: object) -> str | None:
        return None if torch_gemm.rounds(x.dtype, activation) else _matmul.why_slower(x)

    return Impl(
        kernels.name,
        forward,
        backward,
        kernels.why_not,
        (kernels.device,),
        infer,
        why_slower,
        backward_in_parts=backward_in_parts,
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


CPU: Impl = implementation(_native.CPU)
