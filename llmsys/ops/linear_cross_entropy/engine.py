"""A loss over the logits of a linear head, without the logits: rows in chunks, each chunk's gradient made at once.

For each chunk: logits, then the loss, which turns them into their gradient where they lie, then what that adds to the
gradients of input and weights. So the forward leaves gradients behind, and the backward scales them.
Source     Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989, section 3.2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmsys.ops._matmul import matmul

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
    """logits = input · weightᵀ + bias + lora_scale · (input · lora_aᵀ) · lora_bᵀ

    Shapes     input (N, D); weight (V, D); bias (V,); lora_a (R, D); lora_b (V, R); of one dtype
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0

    def project(self, x: Tensor, low: Tensor | None, out: Tensor) -> None:
        if self.bias is not None:
            out.copy_(self.bias)
        matmul(x, self.weight.T, out, add=self.bias is not None)
        if low is not None and self.lora_b is not None:
            matmul(low, self.lora_b.T, out, add=True)

    def low(self, x: Tensor) -> Tensor | None:
        return None if self.lora_a is None else matmul(x, self.lora_a.T, scale=self.lora_scale)


class Gradients:
    """What each chunk adds to: of the input in its dtype or `input_dtype`, of the others in float32 or wider."""

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
        head, of, later = self.head, self.of, rows.start > 0
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


class _Sum(torch.autograd.Function):
    """Σ scale · loss, with gradients made in the forward."""

    @staticmethod
    def forward(ctx: Any, loss: RowLoss, scale: Tensor, factor: Tensor | None, lora_scale: float, *tensors: Tensor):
        head = _head_of(tensors, lora_scale)
        ctx.gradients = Gradients(head, ctx.needs_input_grad[4:], head.input.dtype if factor is None else torch.float32)
        ctx.factor = factor
        return _total(run(head, loss, scale, ctx.gradients), scale, factor)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):
        _refuse_second_derivative()
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "llmsys.linear_cross_entropy: backward a second time through one loss, expected once: its gradients "
                "were made in the forward, and given away; call it again, or use reduction='none'"
            )
        factor = dloss if ctx.factor is None else dloss * ctx.factor
        return None, None, None, None, *_finished(gradients, factor)


class _PerRow(torch.autograd.Function):
    """The loss of each row. What arrives at each is known in the backward only, which makes the logits anew."""

    @staticmethod
    def forward(ctx: Any, loss: RowLoss, lora_scale: float, *tensors: Tensor):
        ctx.loss, ctx.lora_scale = loss, lora_scale
        ctx.save_for_backward(*tensors)
        return run(_head_of(tensors, lora_scale), loss, None, None)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor):
        _refuse_second_derivative()
        head = _head_of(ctx.saved_tensors, ctx.lora_scale)
        gradients = Gradients(head, ctx.needs_input_grad[2:], head.input.dtype)
        run(head, ctx.loss, dlosses.contiguous(), gradients)
        return None, None, *_finished(gradients, None)


def _finished(gradients: Gradients, factor: Tensor | None) -> list[Tensor | None]:
    """Each gradient times `factor`, in the dtype of what it is of."""
    found: list[Tensor | None] = []
    for name in NAMES:
        gradient = gradients.of.pop(name, None)
        if gradient is not None:
            if factor is not None and not (factor.is_cpu and factor.item() == 1):
                gradient.mul_(factor.to(gradient.dtype))
            gradient = gradient.to(getattr(gradients.head, name).dtype)
        found.append(gradient)
    return found


def _head_of(tensors: Sequence[Tensor | None], lora_scale: float) -> Head:
    input, weight, bias, lora_a, lora_b = tensors
    assert input is not None and weight is not None
    return Head(input, weight, bias, lora_a, lora_b, lora_scale)


def _total(losses: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
    total = torch.where(scale == 0, 0.0, losses * scale).sum()  # a row of scale 0 counts nothing, whatever its loss
    return total if factor is None else total * factor


def _needs_gradient(head: Head) -> bool:
    tensors = (getattr(head, name) for name in NAMES)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "llmsys.linear_cross_entropy: the gradient of a gradient (create_graph=True), expected a first derivative; "
            "use torch.nn.functional.linear and llmsys.cross_entropy"
        )


def sum_of(head: Head, loss: RowLoss, scale: Tensor, factor: Tensor | None = None) -> Tensor:
    """factor · Σ scale · loss, scale (N,) and factor () without a gradient.

    The gradient of the logits is rounded to their dtype after `scale`, before `factor`.
    """
    if not _needs_gradient(head):
        return _total(run(head, loss, None, None), scale, factor)
    return _Sum.apply(loss, scale, factor, head.lora_scale, *(getattr(head, name) for name in NAMES))


def per_row(head: Head, loss: RowLoss) -> Tensor:
    """The loss of each row (N,)."""
    if not _needs_gradient(head):
        return run(head, loss, None, None)
    return _PerRow.apply(loss, head.lora_scale, *(getattr(head, name) for name in NAMES))
