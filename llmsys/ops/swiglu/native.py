"""SwiGLU on native kernels."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, rows_of
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """SwiGLU on `kernels`."""
    launch, launch_backward = kernels.launch("swiglu_forward"), kernels.launch("swiglu_backward")

    def forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        (gate, gate_stride), (up, up_stride) = rows_of(gate), rows_of(up)
        y = torch.empty_like(gate) if out is None else out
        dim = gate.shape[-1]
        rows = gate.numel() // dim if dim else 0
        type_ = DTYPES[gate.dtype]
        launch(gate.data_ptr(), up.data_ptr(), y.data_ptr(), rows, dim, gate_stride, up_stride, type_)
        return y

    def backward(
        dy: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (dy, dy_stride), (gate, gate_stride), (up, up_stride) = rows_of(dy), rows_of(gate), rows_of(up)
        dgate, dup = (torch.empty_like(gate), torch.empty_like(gate)) if out is None else out
        dim = gate.shape[-1]
        launch_backward(
            *(dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr()),
            *(gate.numel() // dim if dim else 0, dim, dy_stride, gate_stride, up_stride, DTYPES[gate.dtype]),
        )
        return dgate, dup

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
