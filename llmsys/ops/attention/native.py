"""Attention on native kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmsys import env
from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl
from llmsys.ops.attention import reference
from llmsys.ops.attention.arguments import Arguments
from llmsys.ops.attention.bounds import row_bounds
from llmsys.ops.dropout.reference import threshold_and_scale


def implementation(kernels: Kernels) -> Impl:
    """attention on `kernels`."""
    launch, launch_backward = kernels.launch("attention_forward"), kernels.launch("attention_backward")
    launch_dbias = kernels.launch("attention_dbias")

    def forward(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        given = _in_place(Arguments(*args))
        q, v = given.q, given.v
        y = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device) if out is None else out[0]
        lse = _per_row(q) if out is None else out[1]
        sinks = given.sinks if given.sinks is None else given.sinks.float().contiguous()
        call(launch, given, sinks=sinks, y=y, lse=lse)
        return y, lse

    def backward(
        dy: Tensor, dlse: Tensor | None, y: Tensor, lse: Tensor, *args: Any, out: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        given, needs_dbias = _in_place(Arguments(*args[:-1])), args[-1]
        q, sinks = given.q, given.sinks
        dq, dk, dv = out or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given[:3])
        delta = _per_row(q)
        dlse = dlse if dlse is None else dlse.contiguous()
        made = {"delta": delta, "dq": dq, "dk": dk, "dv": dv}
        tensors = {"y": y.contiguous(), "lse": lse.contiguous(), "dy": _rows_in_place(dy), "dlse": dlse, **made}
        call(launch_backward, given, **tensors)
        dbias, dsinks = q.new_empty(0), q.new_empty(0)
        if given.bias is not None and needs_dbias:
            wide = torch.empty(given.bias.shape, dtype=torch.float32, device=q.device)
            call(launch_dbias, given, **tensors, dbias=wide)
            dbias = wide.to(given.bias.dtype)
        if sinks is not None:
            dsinks = reference.sinks_gradient(delta, lse, sinks)
        return dq, dk, dv, dbias, dsinks

    def why_not(q: Tensor, *args: object) -> str | None:
        if kernels.name.startswith("cuda") and q.dtype == torch.float32:
            return "no kernel for torch.float32: tensor cores multiply 16-bit elements"
        return kernels.why_not(q)

    return Impl(kernels.name, forward, backward, why_not, (kernels.device,))


def call(launch: Any, given: Arguments, **tensors: Tensor | None) -> None:
    """One native function; `tensors` are those beyond the op's arguments, by their names in csrc/attention.h."""
    q, k, v, bias, mask = given.q, given.k, given.v, given.bias, given.block_mask
    slopes = given.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().contiguous()
    rows = row_bounds(given)
    threshold, kept_scale = threshold_and_scale(given.dropout_p)
    dy = tensors.get("dy")
    addresses = (tensors.get(name) for name in ("y", "lse", "dy", "dlse", "delta", "dq", "dk", "dv", "dbias"))
    launch(
        *(_address(x) for x in (q, k, v, bias, tensors.get("sinks"), slopes, mask, rows, *addresses)),
        *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]),
        *(stride for x in (q, k, v, dy) for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        *((1, 1, 0, 0, 0) if bias is None else (*bias.shape[:2], *_broadcast_strides(bias, 3))),
        *((0, 0) if mask is None else _broadcast_strides(mask, 2)),
        *(given.block_size, given.scale, given.softcap, given.seed, min(threshold, 2**32 - 1), kept_scale),
        *(DTYPES[q.dtype], 0 if bias is None else DTYPES[bias.dtype]),
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _per_row(q: Tensor) -> Tensor:
    """An uninitialised float32 (B, H, T)."""
    return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)


def _broadcast_strides(x: Tensor, count: int) -> tuple[int, ...]:
    """The first strides of `x`, 0 for a dimension of one."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:count], x.stride()[:count], strict=True))


def _in_place(given: Arguments) -> Arguments:
    """With tensors whose last dimension is contiguous, and a contiguous block mask."""
    mask = given.block_mask
    return given._replace(
        q=_rows_in_place(given.q),
        k=_rows_in_place(given.k),
        v=_rows_in_place(given.v),
        bias=None if given.bias is None else _rows_in_place(given.bias),
        block_mask=None if mask is None else mask.contiguous(),
    )


def _rows_in_place(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def slower_than_triton(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    """On an H200, causal, the kernels in CUDA took 0.7 of the Triton kernels' time at 2^34 products, launches included,
    and 1.7 at 2^36."""
    products = q.shape[:3].numel() * k.shape[1] * (q.shape[3] + v.shape[3])
    if products < 2**35 or not env.has("triton"):
        return None
    return f"{products / 2**30:.0f} Gi products of queries and keys: from 32 on Triton is faster"


CPU: Impl = implementation(_native.CPU)
CUDA: Impl = replace(implementation(_native.CUDA), why_slower=slower_than_triton)
