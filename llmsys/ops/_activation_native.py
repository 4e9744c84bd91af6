"""Native kernels of y = f(x) and of y = f(gate) · up.

`name(…)`, of what an op takes besides tensors, is the activation's name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmsys.ops._native import DTYPES, Kernels, rows_of
from llmsys.ops._op import Impl

NUMBERS = {"relu": 1, "relu2": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5}  # csrc/activation.h


def gelu_name(approximate: str) -> str:
    """The activation that GELU's `approximate` means."""
    return {"none": "gelu", "tanh": "gelu_tanh"}[approximate]


def unary(kernels: Kernels, name: Callable[..., str]) -> Impl:
    """y = f(x) on `kernels`."""
    launch, launch_backward = kernels.launch("activation_forward"), kernels.launch("activation_backward")

    def forward(x: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        x, stride = rows_of(x)
        y = torch.empty_like(x) if out is None else out
        dim = x.shape[-1]
        rows = x.numel() // dim if dim else 0
        launch(x.data_ptr(), y.data_ptr(), rows, dim, stride, NUMBERS[name(*options)], DTYPES[x.dtype])
        return y

    def backward(dy: Tensor, x: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        (dy, dy_stride), (x, stride) = rows_of(dy), rows_of(x)
        dx = torch.empty_like(x) if out is None else out
        dim = x.shape[-1]
        launch_backward(
            *(dy.data_ptr(), x.data_ptr(), dx.data_ptr(), x.numel() // dim if dim else 0, dim),
            *(dy_stride, stride, NUMBERS[name(*options)], DTYPES[x.dtype]),
        )
        return dx

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


def glu(kernels: Kernels, name: Callable[..., str]) -> Impl:
    """y = f(gate) · up on `kernels`."""
    launch, launch_backward = kernels.launch("glu_forward"), kernels.launch("glu_backward")

    def forward(gate: Tensor, up: Tensor, *options: object, out: Tensor | None = None) -> Tensor:
        (gate, gate_stride), (up, up_stride) = rows_of(gate), rows_of(up)
        y = torch.empty_like(gate) if out is None else out
        dim = gate.shape[-1]
        launch(
            *(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel() // dim if dim else 0, dim),
            *(gate_stride, up_stride, NUMBERS[name(*options)], DTYPES[gate.dtype]),
        )
        return y

    def backward(
        dy: Tensor, gate: Tensor, up: Tensor, *options: object, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        (dy, dy_stride), (gate, gate_stride), (up, up_stride) = rows_of(dy), rows_of(gate), rows_of(up)
        dgate, dup = (torch.empty_like(gate), torch.empty_like(gate)) if out is None else out
        dim = gate.shape[-1]
        launch_backward(
            *(dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr()),
            *(gate.numel() // dim if dim else 0, dim, dy_stride, gate_stride, up_stride),
            *(NUMBERS[name(*options)], DTYPES[gate.dtype]),
        )
        return dgate, dup

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))
