"""Cross entropy in Triton: a program has one row, and loops over it.

The forward reads a row once, with the sum of exponentials rescaled when a larger logit comes. Label smoothing takes a
second reading, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.ops._native import rows_of
from llmsys.ops._triton import contiguous_like, device_of, load, num_warps, store

BLOCK = 4096
# Milakov & Gimelshein 2018, arXiv:1805.02867, is the sum in one pass; here a block of a row is one step of it.


@triton.jit
def sloped_cap(x, softcap):
    """softcap · tanh(x / softcap) and its derivative; near 0 by the first terms of the series, where the quotient below
    would cancel."""
    z, slope = x, 1.0
    if softcap != 0.0:
        u = x / softcap
        magnitude = tl.abs(u)
        e = tl.exp(-2.0 * magnitude)
        far = (1.0 - e) / (1.0 + e)
        s = u * u
        p = -5.70498872745e-3 * s + 2.06390887954e-2  # Cephes tanhf, Moshier 1989
        p = ((p * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s - 3.33332819422e-1
        near = p * (s * magnitude) + magnitude
        t = tl.where(magnitude < 0.625, near, far)
        z = softcap * tl.where(u < 0, -t, t)
        slope = tl.where(magnitude < 0.625, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return z, slope


@triton.jit
def capped(x, softcap):
    z, _ = sloped_cap(x, softcap)
    return z


@triton.jit
def weight_of(weight_ptr, index, mask):
    weight = tl.where(mask, 1.0, 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + index, mask=mask, other=0.0)
    return weight


@triton.jit
def forward_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    lse_ptr,
    classes,
    stride,
    ignore_index,
    smoothing,
    z_loss,
    softcap: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits_ptr += row * stride
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        return
    col = tl.arange(0, BLOCK)
    highest, shift, total = float("-inf"), 0.0, 0.0  # the sum is total · e^shift; shift is 0 while highest is infinite
    for start in range(0, classes, BLOCK):
        mask = start + col < classes
        z = tl.where(mask, capped(load(logits_ptr + start + col, mask), softcap), float("-inf"))
        higher = tl.maximum(highest, tl.max(z, axis=0))
        next_shift = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
        kept = tl.where(highest == float("-inf"), 0.0, total * tl.exp(shift - next_shift))
        total = kept + tl.sum(tl.exp(z - next_shift), axis=0)
        highest, shift = higher, next_shift
    log_total = tl.log(total)
    lse = shift + log_total
    valid = (target >= 0) & (target < classes)
    z_target = capped(load(logits_ptr + target, valid), softcap)
    # Differences from the shift are all but exact: log_total comes last, so that the loss is rounded once.
    loss = (1.0 - smoothing) * ((shift - tl.where(valid, z_target, float("nan"))) + log_total)
    if z_loss != 0.0:
        loss += z_loss * lse * lse
    loss *= weight_of(weight_ptr, target, valid)
    if SMOOTH:
        others, weights = 0.0, 0.0
        for start in range(0, classes, BLOCK):
            mask = start + col < classes
            z = capped(load(logits_ptr + start + col, mask), softcap)
            weight = tl.where(mask, weight_of(weight_ptr, start + col, mask), 0.0)
            others += tl.sum(tl.where(mask, weight * (shift - z), 0.0), axis=0)
            weights += tl.sum(weight, axis=0)
        loss += smoothing / classes * (others + weights * log_total)
    tl.store(loss_ptr + row, tl.where(valid, loss, float("nan")))
    tl.store(lse_ptr + row, lse)


@triton.jit
def backward_kernel(
    dloss_ptr,
    dlse_ptr,
    logits_ptr,
    target_ptr,
    weight_ptr,
    lse_ptr,
    dlogits_ptr,
    classes,
    stride,
    ignore_index,
    smoothing,
    z_loss,
    softcap: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz[c] = along · e^(z[c] - lse) - uniform · w[c] - (c == target) · at_target"""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits_ptr += row * stride
    dlogits_ptr += row * classes
    col = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, classes, BLOCK):
            store(dlogits_ptr + start + col, tl.zeros((BLOCK,), tl.float32), start + col < classes)
        return
    lse = tl.load(lse_ptr + row)
    valid = (target >= 0) & (target < classes)
    at_target = tl.load(dloss_ptr + row) * tl.where(valid, weight_of(weight_ptr, target, valid), float("nan"))
    along = at_target * (1.0 - smoothing)
    if z_loss != 0.0:
        along += at_target * 2.0 * z_loss * lse
    if dlse_ptr is not None:
        along += tl.load(dlse_ptr + row)
    at_target *= 1.0 - smoothing
    uniform = 0.0
    if SMOOTH:
        uniform = tl.load(dloss_ptr + row) * smoothing / classes
        total_weight = 0.0
        for start in range(0, classes, BLOCK):
            total_weight += tl.sum(weight_of(weight_ptr, start + col, start + col < classes), axis=0)
        along += uniform * total_weight
    for start in range(0, classes, BLOCK):
        mask = start + col < classes
        z, slope = sloped_cap(load(logits_ptr + start + col, mask), softcap)
        dz = along * tl.exp(z - lse)
        if SMOOTH:
            dz -= uniform * weight_of(weight_ptr, start + col, mask)
        dz -= tl.where(start + col == target, at_target, 0.0)
        if softcap != 0.0:
            dz *= slope
        store(dlogits_ptr + start + col, dz, mask)


def block_of(classes: int) -> int:
    return min(triton.next_power_of_2(classes), BLOCK)


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    logits, stride = rows_of(logits)
    loss, lse = out or (torch.empty(target.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    classes, block = logits.shape[-1], block_of(logits.shape[-1])
    if target.numel():
        with device_of(logits):
            forward_kernel[(target.numel(),)](
                *(logits, target.contiguous(), weight_in_float32(weight), loss, lse, classes, stride, ignore_index),
                *(label_smoothing, z_loss, softcap, label_smoothing != 0, block),
                num_warps=num_warps(block),
            )
    return loss, lse


def backward(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    out: Tensor | None = None,
) -> Tensor:
    logits, stride = rows_of(logits)
    dlogits = contiguous_like(logits) if out is None else out
    classes, block = logits.shape[-1], block_of(logits.shape[-1])
    if target.numel():
        with device_of(logits):
            backward_kernel[(target.numel(),)](
                *(dloss.contiguous(), None if dlse is None else dlse.contiguous(), logits, target.contiguous()),
                *(weight_in_float32(weight), lse.contiguous(), dlogits, classes, stride, ignore_index),
                *(label_smoothing, z_loss, softcap, label_smoothing != 0, block),
                num_warps=num_warps(block),
            )
    return dlogits


def weight_in_float32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()
