"""Linear head and cross entropy in one, without the logits: the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops import _check
from llmsys.ops._matmul import torch_matmul
from llmsys.ops._op import Impl, Op
from llmsys.ops.cross_entropy import check_options, check_target_and_weight, check_targets
from llmsys.ops.linear_cross_entropy import chunked, native, reference

OP = Op(
    "linear_cross_entropy",
    # With `scale` (N,) the loss is that of all rows, Σ scale · loss, and its gradients, those that are needed, are made
    # in the forward and kept; without, it is the loss of each row, and the backward makes the logits anew.
    forward="(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None, Tensor? lora_a=None,"
    " Tensor? lora_b=None, float lora_scale=1.0, Tensor? weight=None, int ignore_index=-100,"
    " float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0, Tensor? scale=None, bool needs_dinput=False,"
    " bool needs_dlinear_weight=False, bool needs_dlinear_bias=False, bool needs_dlora_a=False,"
    " bool needs_dlora_b=False)"
    " -> (Tensor loss, Tensor kept_dinput, Tensor kept_dlinear_weight, Tensor kept_dlinear_bias, Tensor kept_dlora_a,"
    " Tensor kept_dlora_b)",
    backward="(Tensor dloss, Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? lora_a,"
    " Tensor? lora_b, float lora_scale, Tensor? weight, int ignore_index, float label_smoothing, float z_loss,"
    " float softcap, Tensor? scale, Tensor kept_dinput, Tensor kept_dlinear_weight, Tensor kept_dlinear_bias,"
    " Tensor kept_dlora_a, Tensor kept_dlora_b, bool needs_dinput, bool needs_dlinear_weight, bool needs_dlinear_bias,"
    " bool needs_dlora_a, bool needs_dlora_b)"
    " -> (Tensor dinput, Tensor dlinear_weight, Tensor dlinear_bias, Tensor dlora_a, Tensor dlora_b)",
    implementations=[
        native.CPU,
        chunked.implementation("torch", torch_matmul),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    token_weights: Tensor | None = None,
    num_items: int | Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
) -> Tensor:
    """`cross_entropy` of the logits of a linear head, of which only a few rows exist at a time.

        logits = input · linear_weightᵀ + linear_bias + lora_scale · (input · lora_aᵀ) · lora_bᵀ
        loss = Σ_i token_weights[i] · cross_entropy_i / num_items         with reduction "mean"

    "mean" without `num_items` divides by the sum of token_weights · weight[target] over the rows that count. Give
    `num_items`, the count over all micro-batches and ranks, where gradients are added up.

    Shapes     input (..., D) float16/bfloat16/float32/float64; linear_weight (V, D), linear_bias (V,), lora_a (R, D),
               lora_b (V, R) of its dtype; target (...) int64 in [0, V) or ignore_index; weight (V,);
               token_weights (...) → loss, float32 (float64 for float64): (...) with reduction "none", else ()
    Numerics   logits rounded to the dtype of input, before and after lora's part; from there as `cross_entropy`;
               dlogits rounded to that dtype; dlinear_weight, dlinear_bias, dlora_a, dlora_b summed over rows in
               float32 and rounded once; dinput rounded once, and again by an incoming gradient other than 1 (in
               float16 kept in float32, and rounded once)
    Gradient   of input, linear_weight, linear_bias, lora_a and lora_b, each only where needed. "mean" and "sum" make
               them in the forward and keep them, not the logits: 4 bytes an element, input's of its own size. The
               backward scales them where they lie, or into memory of their own under retain_graph=True and
               torch.compile. "none" makes the logits anew in the backward. The gradient of a gradient takes all logits
    Cost       2·N·D·V flop forward, 4·N·D·V more for gradients ("none": 6): compute-bound; memory for at most an eighth
               of the logits (or 4 MiB), beside gradients in float32
    Errors     ValueError if shapes do not fit as above, devices differ, a target on the CPU is out of range, an option
               is, or only one of lora_a and lora_b is given; TypeError for a dtype not named above
    Source     Wijmans et al. 2024, arXiv:2411.09009; signature of torch.nn.functional.linear_cross_entropy
    """
    check_options("linear_cross_entropy", ignore_index, reduction, label_smoothing, z_loss, softcap)
    _check_shapes(input, linear_weight, target, linear_bias, lora_a, lora_b)
    check_target_and_weight("linear_cross_entropy", input, target, weight, linear_weight.shape[0])
    check_targets("linear_cross_entropy", target, linear_weight.shape[0], ignore_index)
    _check_counting(target, token_weights, num_items, reduction)
    wide = torch.promote_types(input.dtype, torch.float32)
    tokens = None if token_weights is None else token_weights.flatten().to(wide)
    flat_target, scale, factor = target.flatten(), None, None
    if reduction != "none":
        scale = torch.ones(flat_target.shape, dtype=wide, device=input.device) if tokens is None else tokens
        if reduction == "mean":
            if num_items is None:
                divisor = (_row_weights(flat_target, weight, ignore_index, wide) * scale).sum()
            else:
                divisor = torch.as_tensor(num_items, dtype=wide, device=input.device)
            if input.dtype == torch.float16:  # dlogits over the number of items would underflow: divide in float32
                factor = 1 / divisor
            else:
                scale = scale / divisor
    head = torch.atleast_2d(input).flatten(0, -2), linear_weight, linear_bias, lora_a, lora_b
    recorded = torch.is_grad_enabled()
    loss = OP(
        *(*head[:2], flat_target, *head[2:], float(lora_scale)),
        *(weight, ignore_index, float(label_smoothing), float(z_loss), float(softcap), scale),
        *(recorded and tensor is not None and tensor.requires_grad for tensor in head),
    )
    if reduction == "none":
        return (loss if tokens is None else loss * tokens).view(target.shape)
    return loss if factor is None else loss * factor


def _row_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """w[t] of each row, 0 of those that are ignored: what a mean divides by the sum of."""
    counts = target != ignore_index
    if weight is None:
        return counts.to(dtype)
    return weight.to(dtype)[target.clamp(0, weight.shape[0] - 1)].where(counts, 0.0)


def _check_shapes(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
) -> None:
    if input.dtype not in _check.FLOATS:
        raise TypeError(
            f"llmsys.linear_cross_entropy: input is {input.dtype}, expected float32, bfloat16, float16 or float64"
        )
    if (
        input.dim() < 1
        or linear_weight.dim() != 2
        or input.shape[-1] != linear_weight.shape[1]
        or linear_weight.shape[0] == 0
        or target.shape != input.shape[:-1]
    ):
        raise ValueError(
            f"llmsys.linear_cross_entropy: input has shape {tuple(input.shape)}, linear_weight "
            f"{tuple(linear_weight.shape)} and target {tuple(target.shape)}, expected (..., D), (V, D) and (...), V > 0"
        )
    if (lora_a is None) != (lora_b is None):
        given, missing = ("lora_a", "lora_b") if lora_b is None else ("lora_b", "lora_a")
        raise ValueError(f"llmsys.linear_cross_entropy: {given} without {missing}, expected both or neither")
    classes, dim = linear_weight.shape
    rank = lora_a.shape[0] if lora_a is not None and lora_a.dim() == 2 else "R"
    expected = {
        "linear_weight": (linear_weight, (classes, dim)),
        "linear_bias": (linear_bias, (classes,)),
        "lora_a": (lora_a, (rank, dim)),
        "lora_b": (lora_b, (classes, rank)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.device != input.device:
            raise ValueError(
                f"llmsys.linear_cross_entropy: {name} has shape {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{shape} on {input.device}"
            )
        if tensor.dtype != input.dtype:
            raise TypeError(f"llmsys.linear_cross_entropy: {name} is {tensor.dtype}, expected {input.dtype} (input's)")


def _check_counting(
    target: Tensor, token_weights: Tensor | None, num_items: int | Tensor | None, reduction: str
) -> None:
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"llmsys.linear_cross_entropy: num_items with reduction {reduction!r}, expected 'mean', which divides by it"
        )
    if token_weights is None:
        return
    if token_weights.shape != target.shape or token_weights.device != target.device:
        raise ValueError(
            f"llmsys.linear_cross_entropy: token_weights has shape {tuple(token_weights.shape)} on "
            f"{token_weights.device}, expected {tuple(target.shape)} on {target.device}, as target"
        )
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "llmsys.linear_cross_entropy: token_weights requires a gradient, expected one that does not; use "
            "token_weights.detach()"
        )
