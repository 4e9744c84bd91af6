"""Cross entropy: the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.cross_entropy import native, reference

OP = Op(
    "cross_entropy",
    forward="(Tensor logits, Tensor target, Tensor? weight=None, int ignore_index=-100, float label_smoothing=0.0,"
    " float z_loss=0.0, float softcap=0.0) -> (Tensor loss, Tensor lse)",
    backward="(Tensor dloss, Tensor? dlse, Tensor logits, Tensor target, Tensor? weight, Tensor lse, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap) -> (Tensor dlogits)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.cross_entropy.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log likelihood of `target` under the softmax of each row of `logits`.

        z = softcap · tanh(logits / softcap), or logits where softcap is 0;  lse = log Σ_c exp(z[c])
        loss = w[t] · ((1 - s) · (lse - z[t]) + z_loss · lse²) + s / V · Σ_c w[c] · (lse - z[c]),  s = label_smoothing

    With reduction "mean" the sum of the losses is divided by the sum of w[t] over the rows that count, as PyTorch does;
    with no such row it is NaN, as there.

    Shapes     logits (..., V) float16/bfloat16/float32/float64, any strides; target (...) int64 in [0, V) or
               ignore_index; weight (V,), 1 where None → loss, float32 (float64 for float64): (...) with reduction
               "none", () with "mean" and "sum"; with return_lse, (loss, lse), lse (...)
    Numerics   computed in float32 (float64 for float64); loss and lse rounded once to float32, dlogits once to the
               dtype of logits. A row whose target is ignore_index has loss, lse and gradient 0 and is not read; on a
               GPU, where targets are not checked, one out of range has loss and gradient NaN
    Gradient   dlogits, from loss and lse; saves logits, target, weight and lse (4 bytes a row); none for weight
    Cost       N·V·itemsize bytes forward, twice that backward; 6·N·V flop each: bound by bandwidth where exp is fast
    Errors     ValueError if shapes do not fit as above, V == 0, devices differ, a target on the CPU is out of range,
               weight requires a gradient, or an option is out of range; TypeError for a dtype not named above
    Source     label smoothing: Szegedy et al. 2015, arXiv:1512.00567, section 7; z-loss: Chowdhery et al. 2022,
               arXiv:2204.02311, section 5; softcap: Gemma 2, arXiv:2408.00118, section 2
    """
    _check_arguments(logits, target, weight)
    check_options("cross_entropy", ignore_index, reduction, label_smoothing, z_loss, softcap)
    check_targets("cross_entropy", target, logits.shape[-1], ignore_index)
    loss, lse = OP(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / total_weight(target, weight, ignore_index)
    return (loss, lse) if return_lse else loss


def total_weight(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What "mean" divides by: the sum of w[t] over the rows that count."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    return weight[target.clamp(0, weight.shape[0] - 1)].where(counts, 0.0).sum(dtype=torch.float32)


def _check_arguments(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if logits.dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.cross_entropy: logits is {logits.dtype}, expected float32, bfloat16, float16, float64")
    if logits.dim() == 0 or logits.shape[-1] == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"llmsys.cross_entropy: logits has shape {tuple(logits.shape)} and target {tuple(target.shape)}, expected "
            "logits (..., V) and target (...) with V > 0"
        )
    check_target_and_weight("cross_entropy", logits, target, weight, logits.shape[-1])


def check_target_and_weight(op: str, first: Tensor, target: Tensor, weight: Tensor | None, classes: int) -> None:
    """Raise unless target is int64 and weight None or (classes,), floating, without a gradient, where `first` is."""
    if target.dtype != torch.int64:
        raise TypeError(f"llmsys.{op}: target is {target.dtype}, expected torch.int64")
    if target.device != first.device:
        raise ValueError(f"llmsys.{op}: target is on {target.device}, expected {first.device}")
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(f"llmsys.{op}: weight is {weight.dtype}, expected a floating dtype")
    if weight.shape != (classes,) or weight.device != first.device:
        raise ValueError(
            f"llmsys.{op}: weight has shape {tuple(weight.shape)} on {weight.device}, expected ({classes},) on "
            f"{first.device}: one for each class"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"llmsys.{op}: weight requires a gradient, expected one that does not; use weight.detach()")


def check_options(
    op: str, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, softcap: float
) -> None:
    """Raise unless every option is one that works."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"llmsys.{op}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"llmsys.{op}: ignore_index is {ignore_index}, expected a number that int64 holds")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"llmsys.{op}: label_smoothing is {label_smoothing}, expected a number from 0 to 1")
    for name, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not value >= 0:
            raise ValueError(f"llmsys.{op}: {name} is {value}, expected a number >= 0")


def check_targets(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise for a target on the CPU that is neither a class nor ignored. On a GPU that would wait for it."""
    if not target.is_cpu or torch.compiler.is_compiling() or type(target) is not Tensor or target.numel() == 0:
        return
    if torch._C._are_functorch_transforms_active():
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"llmsys.{op}: target has {target[wrong][0].item()}, expected classes from 0 to {classes - 1} "
            f"or ignore_index={ignore_index}"
        )
