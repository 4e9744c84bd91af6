"""The three matrix products of a linear head, each in one function: the seam for a faster GEMM.

PyTorch multiplies 16-bit matrices on CPUs without AVX-512 or AMX at a tenth of its float32 rate (torch 2.13: 18 against
165 GFLOP/s). There, blocks of rows of the weight are widened and multiplied in float32, which also sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256  # rows of the weight: widened they stay in the caches, and a float32 GEMM is at its rate


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (N, V) = x (N, D) · weightᵀ (V, D), rounded once."""
    if not _widened(x):
        torch.mm(x, weight.T, out=out)
        return
    x = x.float()
    for rows in _blocks(weight):
        out[:, rows] = torch.mm(x, weight[rows].float().T)


def project_back(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (N, D) = dlogits (N, V) · weight (V, D), rounded once."""
    if not _widened(dlogits):
        torch.mm(dlogits, weight, out=out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32)
    for rows in _blocks(weight):
        torch.addmm(total, dlogits[:, rows].float(), weight[rows].float(), out=total)
    out.copy_(total)


def add_outer(dlogits: Tensor, x: Tensor, out: Tensor) -> None:
    """out (V, D), float32 or wider, += dlogitsᵀ (V, N) · x (N, D)."""
    if x.dtype == out.dtype:
        torch.addmm(out, dlogits.T, x, out=out)  # not addmm_, which torch's counter of flops passes over
    elif x.is_cuda:  # in blocks, as what is added is a matrix by itself before
        for rows in _blocks(out):
            out[rows] += torch.mm(dlogits[:, rows].T, x, out_dtype=out.dtype)
    else:
        x = x.float()
        for rows in _blocks(out):
            torch.addmm(out[rows], dlogits[:, rows].float().T, x, out=out[rows])


def _widened(x: Tensor) -> bool:
    return x.is_cpu and x.element_size() == 2


def _blocks(matrix: Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, matrix.shape[0], BLOCK))
