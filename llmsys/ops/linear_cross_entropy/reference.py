"""Linear head and cross entropy in plain PyTorch, with all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmsys.ops.cross_entropy import reference as cross_entropy


def forward(
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
    *needed: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(loss, its gradients where `scale` is given and they are needed): see `llmsys.linear_cross_entropy`."""
    options = ignore_index, label_smoothing, z_loss, softcap
    logits = project(input, linear_weight, linear_bias, lora_a, lora_b, lora_scale)
    loss, lse = cross_entropy.forward(logits, target, weight, *options)
    kept = tuple(input.new_empty(0) for _ in needed)
    if scale is not None:
        if any(needed):
            dlogits = cross_entropy.backward(scale, None, logits, target, weight, lse, *options)
            kept = gradients(dlogits, input, linear_weight, lora_a, lora_b, lora_scale, *needed)
        loss = torch.where(scale == 0, 0.0, loss * scale).sum()
    return loss if out is None else out.copy_(loss), *kept


def backward(
    dloss: Tensor,
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
    *kept_and_needed: Any,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients, without elements where not needed: those kept times `dloss`. Where nothing is kept, or a gradient
    is recorded, they are computed from the logits, so that this function can itself be differentiated."""
    kept, needed = kept_and_needed[:5], kept_and_needed[5:]
    if scale is None or torch.is_grad_enabled():
        options = ignore_index, label_smoothing, z_loss, softcap
        logits = project(input, linear_weight, linear_bias, lora_a, lora_b, lora_scale)
        _, lse = cross_entropy.forward(logits, target, weight, *options)
        dlosses = dloss if scale is None else dloss * scale
        dlogits = cross_entropy.backward(dlosses, None, logits, target, weight, lse, *options)
        found = gradients(dlogits, input, linear_weight, lora_a, lora_b, lora_scale, *needed)
    else:
        found = tuple(gradient * dloss for gradient in kept)
    dinput, *others = (gradient.to(input.dtype) for gradient in found)
    return dinput if out is None or not needed[0] else out.copy_(dinput), *others


def project(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
) -> Tensor:
    """The logits."""
    logits = linear(input, linear_weight, linear_bias)
    if lora_a is None or lora_b is None:
        return logits
    return logits + linear(lora_scale * linear(input, lora_a), lora_b)


def gradients(
    dlogits: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    needs_dinput: bool,
    needs_dlinear_weight: bool,
    needs_dlinear_bias: bool,
    needs_dlora_a: bool,
    needs_dlora_b: bool,
) -> tuple[Tensor, ...]:
    """That of the input in its `kept_dtype`, the others in float32 or wider, without elements where not needed."""
    narrow, wide = kept_dtype(input), torch.promote_types(input.dtype, torch.float32)
    dinput, dlinear_weight, dlinear_bias, dlora_a, dlora_b = (input.new_empty(0) for _ in range(5))
    if needs_dinput:
        dinput = dlogits.to(narrow) @ linear_weight.to(narrow)
    if needs_dlinear_weight:
        dlinear_weight = dlogits.to(wide).T @ input.to(wide)
    if needs_dlinear_bias:
        dlinear_bias = dlogits.sum(0, dtype=wide)
    if lora_a is not None and lora_b is not None:
        dlow = lora_scale * (dlogits @ lora_b)
        if needs_dinput:
            dinput = dinput + dlow.to(narrow) @ lora_a.to(narrow)
        if needs_dlora_a:
            dlora_a = dlow.to(wide).T @ input.to(wide)
        if needs_dlora_b:
            dlora_b = dlogits.to(wide).T @ (lora_scale * linear(input, lora_a)).to(wide)
    return dinput, dlinear_weight, dlinear_bias, dlora_a, dlora_b


def kept_dtype(input: Tensor) -> torch.dtype:
    """That of the input's gradient until the loss's own gradient is known: a large one, or a small divisor, may stand
    between it and what float16 can hold."""
    return torch.float32 if input.dtype is torch.float16 else input.dtype
