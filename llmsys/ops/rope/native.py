"""Rotary position embedding on native kernels, of one tensor or of queries and keys in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl

NOTHING: tuple[int, ...] = 0, 0, 0  # strides of what is not there


def implementation(kernels: Kernels) -> Impl:
    """Rotary position embedding on `kernels`."""
    launch = kernels.launch("rope")

    def forward(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return rotate(launch, (x,), cos, sin, interleaved, False, None if out is None else (out,))[0]

    def backward(
        dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return rotate(launch, (dy,), cos, sin, interleaved, True, None if out is None else (out,))[0]

    return Impl(kernels.name, forward, backward, kernels.why_not, (kernels.device,))


def rotate(
    launch: Callable,
    inputs: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    inverse: bool,
    outputs: Sequence[torch.Tensor] | None,
) -> Sequence[torch.Tensor]:
    """One or two tensors that share B, T and K, rotated in one call; into `outputs`, which may be the inputs."""
    inputs = [with_whole_rows(x) for x in inputs]
    cos, sin = with_whole_rows(cos.float()), with_whole_rows(sin.float())
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if outputs is None:
        outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    q, q_out = inputs[0], outputs[0]
    batch, tokens, q_heads, head_dim = q.shape
    if len(inputs) == 1:
        k_address, k_out_address, k_heads, k_strides, k_out_strides = 0, 0, 0, NOTHING, NOTHING
    else:
        k, k_out = inputs[1], outputs[1]
        k_address, k_out_address, k_heads = k.data_ptr(), k_out.data_ptr(), k.shape[2]
        k_strides, k_out_strides = k.stride()[:-1], k_out.stride()[:-1]
    launch(
        *(q.data_ptr(), k_address, q_out.data_ptr(), k_out_address, cos.data_ptr(), sin.data_ptr()),
        *(batch, tokens, q_heads, k_heads, head_dim, 2 * cos.shape[-1]),
        *(*q.stride()[:-1], *k_strides, *q_out.stride()[:-1], *k_out_strides),
        *(*table_strides(cos), interleaved, inverse, DTYPES[q.dtype]),
    )
    return outputs


def with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied unless the elements of its last dimension lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def table_strides(table: torch.Tensor) -> tuple[int, int]:
    """The distances between the rows of two sequences and of two tokens."""
    return (0, table.stride(0)) if table.dim() == 2 else (table.stride(0), table.stride(1))


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = implementation(_native.CUDA)
