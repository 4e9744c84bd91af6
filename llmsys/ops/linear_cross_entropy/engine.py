"""A loss over the logits of a linear head, without the logits: rows in chunks, each chunk's gradient made at once.

For each chunk: logits, then the loss, which turns them into their gradient where they lie, then what that adds to the
gradients of input and weights. So a forward leaves gradients behind, and its backward scales them.
Source     Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989, section 3.2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmsys.ops._matmul import Matmul

MAX_ROWS = 512  # a GEMM with more rows is no faster
SMALL_BYTES = 4 << 20  # what a chunk may take in any case
NAMES = ("input", "weight", "bias", "lora_a", "lora_b")


class RowLoss(Protocol):
    """A loss of each row of logits."""

    def __call__(self, logits: Tensor, rows: slice, scale: Tensor | None) -> Tensor:
        """The loss (n,), in float32 or wider, of `logits` (n, V), which are `rows` of all rows.

        With `scale` (n,), `logits` hold the gradient of Σ scale · loss when it returns; without, anything.
        """
        ...


@dataclass(frozen=True)
class Head:
    """logits = input · weightᵀ + bias + lora_scale · (input · lora_aᵀ) · lora_bᵀ, on `matmul`

    Shapes     input (N, D); weight (V, D); bias (V,); lora_a (R, D); lora_b (V, R); of one dtype
    """

    matmul: Matmul
    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0

    def project(self, x: Tensor, low: Tensor | None, out: Tensor) -> None:
        if self.bias is not None:
            out.copy_(self.bias)
        self.matmul(x, self.weight.T, out, add=self.bias is not None)
        if low is not None and self.lora_b is not None:
            self.matmul(low, self.lora_b.T, out, add=True)

    def low(self, x: Tensor) -> Tensor | None:
        return None if self.lora_a is None else self.matmul(x, self.lora_a.T, scale=self.lora_scale)


class Gradients:
    """What each chunk adds to: of the input in `input_dtype`, of the others in float32 or wider."""

    def __init__(self, head: Head, needed: Sequence[bool], input_dtype: torch.dtype):
        wide = torch.promote_types(head.weight.dtype, torch.float32)
        make = torch.empty if len(head.input) else torch.zeros  # the first chunk writes, those after it add
        self.head = head
        self.of: dict[str, Tensor] = {}
        for name, need in zip(NAMES, needed, strict=True):
            tensor = getattr(head, name)
            if need and tensor is not None:
                dtype = input_dtype if name == "input" else wide
                self.of[name] = make(tensor.shape, dtype=dtype, device=tensor.device)

    def add(self, dlogits: Tensor, x: Tensor, low: Tensor | None, rows: slice) -> None:
        head, of, later, matmul = self.head, self.of, rows.start > 0, self.head.matmul
        if "input" in of:
            matmul(dlogits, head.weight, of["input"][rows])
        if "weight" in of:
            matmul(dlogits.T, x, of["weight"], add=later)
        if "bias" in of:
            total = dlogits.sum(0, dtype=of["bias"].dtype)
            of["bias"] = of["bias"] + total if later else total
        if low is None or head.lora_a is None or head.lora_b is None:
            return
        if "lora_b" in of:
            matmul(dlogits.T, low, of["lora_b"], add=later)
        if "lora_a" in of or "input" in of:
            dlow = matmul(dlogits, head.lora_b, scale=head.lora_scale)
            if "lora_a" in of:
                matmul(dlow.T, x, of["lora_a"], add=later)
            if "input" in of:
                matmul(dlow, head.lora_a, of["input"][rows], add=True)


def chunk_rows(rows: int, row_bytes: int) -> int:
    """How many rows of logits are held at a time, in equal chunks: of an eighth of all, or of SMALL_BYTES where that is
    more, all but a hundredth, as the loss holds something too; MAX_ROWS at most."""
    most = max(rows * 127 // 1024, SMALL_BYTES * 127 // 128 // row_bytes)
    most = max(1, min(most, MAX_ROWS))
    return max(1, -(-rows // -(-rows // most))) if rows else 1


def run(head: Head, loss: RowLoss, scale: Tensor | None, gradients: Gradients | None) -> Tensor:
    """The loss of each row; with `gradients`, those of Σ scale · loss are left there."""
    x, classes = head.input, head.weight.shape[0]
    num_rows = x.shape[0]
    losses = torch.empty(num_rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    step = chunk_rows(num_rows, classes * x.element_size())
    buffer = torch.empty(min(step, num_rows), classes, dtype=x.dtype, device=x.device)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        chunk = x[rows]
        logits, low = buffer[: chunk.shape[0]], head.low(chunk)
        head.project(chunk, low, logits)
        losses[rows] = loss(logits, rows, None if gradients is None or scale is None else scale[rows])
        if gradients is not None:
            gradients.add(logits, chunk, low, rows)
    return losses


def rounded(gradient: Tensor, factor: Tensor, dtype: torch.dtype, once: bool) -> Tensor:
    """gradient · factor, rounded to `dtype`; `once`: where `gradient` lies, if that is of this dtype."""
    here = once and gradient.dtype is dtype
    if factor.is_cpu and factor.item() == 1:
        return gradient if here else gradient.to(dtype, copy=True)
    out = gradient if here else torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    row_bytes = gradient[:1].numel() * gradient.element_size()
    # On the CPU PyTorch makes all products before it rounds them.
    step = max(1, SMALL_BYTES // max(1, row_bytes)) if gradient.is_cpu else max(1, len(gradient))
    for start in range(0, len(gradient), step):
        rows = slice(start, start + step)
        torch.mul(gradient[rows], factor, out=out[rows])
    return out
