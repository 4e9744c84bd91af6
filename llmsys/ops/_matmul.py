"""Matrix products on the CPU, in one place: llmsys's own GEMM (csrc/cpu/gemm.h), or PyTorch's where that is faster."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, matrix_of

BLOCK = 256  # rows of a product that PyTorch makes by itself before it is added


class Matmul(Protocol):
    """A way to multiply matrices."""

    def __call__(
        self, a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False, scale: float = 1.0
    ) -> Tensor:
        """scale · a · b, in `out` where that is given, added to what it holds with `add`.

        Shapes     a (M, K), b (K, N), of one dtype and any strides; out (M, N) of that dtype or float32, its rows
                   contiguous inside, its memory no part of a's or b's
        """
        ...


def rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its last dimension's vectors."""
    return torch.atleast_2d(x).flatten(0, -2)


def why_slower(x: Tensor, *args: object) -> str | None:
    """Why PyTorch's GEMM is the better choice for matrices of x's dtype on this CPU; None where llmsys's own is.

    Measured on one thread of a Zen 4, GFLOP/s of PyTorch 2.13 and of llmsys: bfloat16, where both use AVX512_BF16,
    199–213 and 199–214 at 112×768×2048, 204–215 and 191–208 at 512×2048×4096; float32 90–93 and 93–103. In bfloat16 on
    AVX2, 32 times 2048×4096 take 2.4 times as long in PyTorch, 512 times 4. What AMX and AVX512_FP16 offer, llmsys's
    GEMM does not use. One row is the exception that is not made, so that its bits are those that it has in a batch.
    """
    unit = _native.matrix_unit(x.dtype)
    if unit is None:
        return None
    return f"PyTorch's GEMM is faster in {str(x.dtype).removeprefix('torch.')} on this CPU, which has {unit}"


def implementation(kernels: Kernels) -> Matmul:
    """llmsys's own GEMM: summed in float32, scaled, added to and rounded once. The bits of an element depend neither on
    the other rows and columns nor on the number of threads."""
    launch = kernels.launch("matmul")

    def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False, scale: float = 1.0) -> Tensor:
        (rows, depth), cols = a.shape, b.shape[1]
        if out is None:
            assert not add
            out = torch.empty(rows, cols, dtype=a.dtype)
        assert out.shape == (rows, cols) and (out.stride(1) == 1 or cols <= 1)
        a, *a_strides = matrix_of(a)
        b, *b_strides = matrix_of(b)
        launch(
            *(a.data_ptr(), b.data_ptr(), out.data_ptr(), rows, cols, depth, *a_strides, *b_strides, out.stride(0)),
            *(scale, add, DTYPES[a.dtype], DTYPES[out.dtype]),
        )
        return out

    return matmul


def torch_matmul(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False, scale: float = 1.0) -> Tensor:
    """PyTorch's GEMM. A float32 `out` of 16-bit matrices is written in blocks of rows, on the CPU from matrices made
    wide, for which alone it has a product there."""
    if out is None or (out.dtype is a.dtype and not add):
        return _scaled(torch.mm(a, b, out=out), scale)
    if out.dtype is a.dtype:
        return torch.addmm(out, a, b, alpha=scale, out=out)  # not addmm_, which torch's counter of flops passes over
    b = b.to(out.dtype) if b.is_cpu else b
    for start in range(0, len(out), BLOCK):
        rows = slice(start, start + BLOCK)
        product = torch.mm(a[rows].to(b.dtype), b) if b.is_cpu else torch.mm(a[rows], b, out_dtype=out.dtype)
        product = _scaled(product, scale)
        out[rows] = out[rows] + product if add else product
    return out


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1 else product.mul_(scale)


def by_rule(kernels: Kernels) -> Matmul:
    """llmsys's GEMM on `kernels` unless `why_slower`; always where `out` is wider than the matrices, which PyTorch
    would have to widen first."""
    own = implementation(kernels)

    def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False, scale: float = 1.0) -> Tensor:
        wide = out is not None and out.dtype is not a.dtype
        return (own if wide or why_slower(a) is None else torch_matmul)(a, b, out, add=add, scale=scale)

    return matmul
