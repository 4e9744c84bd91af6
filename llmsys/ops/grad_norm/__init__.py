"""Gradient norm: the contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, ListOp, triton
from llmsys.ops.grad_norm import native, reference

TRITON = triton("llmsys.ops.grad_norm.triton_kernels")


def why_not_triton(tensors: list[torch.Tensor]) -> str | None:
    return next((reason for tensor in tensors if (reason := TRITON.why_not(tensor)) is not None), None)


OP = ListOp(
    "grad_norm",
    forward="(Tensor[] tensors) -> (Tensor norm)",
    backward=None,
    implementations=[native.CPU, replace(TRITON, why_not=why_not_triton), Impl("reference", reference.forward)],
)


@torch.no_grad()
def grad_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm of all elements of a list of tensors together.

    Shapes     tensors of any shapes, strides and float16/bfloat16/float32/float64, mixed, on one device
               → () float32 (float64 where a tensor is); zero, on the CPU, for no tensors
    Numerics   squares are summed in float32 in chunks, the chunks in float64: the same bits whatever the number of
               threads; infinite where an element's square overflows float32
    Gradient   none
    Cost       one read of the tensors, 2·N flop: bandwidth-bound
    Errors     TypeError for a dtype not named above, ValueError if devices differ
    Source     Pascanu et al. 2013, arXiv:1211.5063, algorithm 1: the norm that clipping compares
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(())
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in _check.FLOATS:
            expected = ", ".join(map(str, _check.FLOATS))
            raise TypeError(f"llmsys.grad_norm: tensors[{i}] is {tensor.dtype}, expected one of {expected}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"llmsys.grad_norm: tensors[{i}] is on {tensor.device} and tensors[0] on {tensors[0].device}, "
                "expected one device"
            )
    return OP(tensors)
