"""Linear head and cross entropy by the chunk engine."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmsys.ops._matmul import Matmul
from llmsys.ops._op import Impl
from llmsys.ops.linear_cross_entropy.engine import NAMES, Gradients, Head, rounded, run
from llmsys.ops.linear_cross_entropy.loss import CrossEntropy
from llmsys.ops.linear_cross_entropy.reference import kept_dtype


def implementation(name: str, matmul: Matmul, **when: Any) -> Impl:
    """The loss on `matmul`, and on the cross entropy that is selected for each chunk; `when` says where and when it can
    run, as `Impl` has it."""

    def parts(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_scale: float,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        scale: Tensor | None,
        *others: Any,
    ) -> tuple[Head, CrossEntropy, Tensor | None, tuple]:
        head = Head(matmul, input, linear_weight, linear_bias, lora_a, lora_b, lora_scale)
        return head, CrossEntropy(target, weight, ignore_index, label_smoothing, z_loss, softcap), scale, others

    def forward(*args: Any, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """(loss, its gradients where `scale` is given and they are needed)."""
        head, loss, scale, needed = parts(*args)
        keeps = scale is not None and any(needed)
        gradients = Gradients(head, needed, kept_dtype(head.input)) if keeps else None
        result = _reduced(run(head, loss, scale, gradients), scale, out)
        return result, *_in_order({} if gradients is None else gradients.of, head.input)

    def infer(*args: Any, out: Tensor | None = None) -> Tensor:
        head, loss, scale, _ = parts(*args)
        return _reduced(run(head, loss, None, None), scale, out)

    def backward(dloss: Tensor, *args: Any, out: Tensor | None = None, once: bool = False) -> tuple[Tensor, ...]:
        """The gradients, without elements where not needed: those kept times `dloss`, or those of each row's loss,
        whose logits are made anew. `once`: what was kept may be written over."""
        head, loss, scale, others = parts(*args)
        kept, needed, dtype = others[: len(NAMES)], others[len(NAMES) :], head.input.dtype
        if scale is None:
            made = Gradients(head, needed, dtype)
            run(head, loss, dloss.contiguous(), made)
            found = {name: made.of.pop(name).to(dtype) for name in list(made.of)}
        else:
            named = zip(NAMES, kept, needed, strict=True)
            found = {name: rounded(gradient, dloss, dtype, once) for name, gradient, need in named if need}
        if out is not None and "input" in found:
            found["input"] = out.copy_(found["input"])
        return _in_order(found, head.input)

    return Impl(name, forward, backward, infer=infer, backward_once=partial(backward, once=True), **when)


def _reduced(losses: Tensor, scale: Tensor | None, out: Tensor | None) -> Tensor:
    """Σ scale · loss, where a row of scale 0 counts nothing, whatever its loss; the losses themselves without scale."""
    result = losses if scale is None else torch.where(scale == 0, 0.0, losses * scale).sum()
    return result if out is None else out.copy_(result)


def _in_order(found: dict[str, Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """Those of `found` as the schemas have them, and one of its own without elements for each that is not there."""
    return tuple(found[name] if name in found else like.new_empty(0) for name in NAMES)
