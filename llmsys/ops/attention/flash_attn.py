"""Attention by the package flash-attn, for whoever asks for it by name.

What its functions take and give is read from its releases 2.7.0 to 2.8.3, flash_attn/flash_attn_interface.py and
csrc/flash_attn/flash_api.cpp. Where they differ from `llmsys.attention`:

- lse is +inf for a query that sees nothing, and for one whose scores are NaN.
- Causal ALiBi is added as slope · s, which leaves lse too large by slope · place. In a window that hides nothing it is
  added as ours is.
- A right side of the window that is -1, beside a left one that is not, or at least max_seqlen_k, is max_seqlen_k: too
  few keys for queries more than that before the end.
- Tokens behind the last packed sequence stay as they are in memory; max_seqlen_q = 1 takes none, and no empty ones.
- Memory is read 16 bytes at a time, whatever the strides.
- No gradient arrives at lse.
- Key heads that several query heads share get the sum of gradients that are already rounded.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsys import env
from llmsys.ops._op import Impl
from llmsys.ops.attention.arguments import Arguments

OLDEST = (2, 7)  # before it, functions of other signatures


def why_not(*args: Any) -> str | None:
    """What this machine lacks, or what flash-attn cannot do; of tensors on a GPU."""
    release = env.release("flash-attn")
    if release is None:
        return "flash-attn is not installed"
    if release < OLDEST:
        return f"flash-attn is {release[0]}.{release[1]}, expected 2.7 or later"
    if torch.version.hip:
        return "flash-attn is known on NVIDIA's GPUs only"
    if (capability := torch.cuda.get_device_capability(args[0].device)) < (8, 0):
        return f"flash-attn needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return inexpressible(Arguments(*args))


def inexpressible(given: Arguments) -> str | None:
    """What in `given` flash-attn has no argument or no kernel for."""
    dim, value_dim = given.q.shape[-1], given.v.shape[-1]
    for name in ("bias", "sinks", "block_mask"):
        if getattr(given, name) is not None:
            return f"flash-attn has no {name}"
    if given.dropout_p:
        return "flash-attn drops by random numbers of its own"
    if given.q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn has no kernel for {given.q.dtype}"
    if dim != value_dim:
        return f"flash-attn has one head dim, given D={dim} and E={value_dim}"
    if dim % 8:
        return f"flash-attn has head dims that are multiples of 8, given {dim}"
    if not given.scale > 0:
        return f"flash-attn hides keys by scores of -inf before it scales, given scale {given.scale}"
    queries, keys = given.q.shape[1], given.k.shape[1]
    left, right = _window(given)
    if given.cu_seqlens_q is None and queries > keys > 0 and (right >= keys or left >= 0 > right):
        return f"flash-attn cuts window {left, right} short for {queries} queries of {keys} keys"
    return None


def _window(given: Arguments) -> tuple[int, int]:
    """Keys seen before and after a query's own place, -1 where that hides none."""
    left, right = given.window_left, given.window_right
    return left if left < given.k.shape[1] - 1 else -1, right if right < given.q.shape[1] - 1 else -1


class Question(NamedTuple):
    """The arguments of flash-attn's functions, of which there is one pair for packed sequences and one for others."""

    kind: str  # "" or "_varlen"
    qkv: tuple[Tensor, Tensor, Tensor]  # of packed sequences three dimensions, without the tokens behind the last one
    lengths: tuple  # of packed sequences cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options: tuple  # dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes

    def ask(self, direction: str, *tensors: Tensor, last: bool) -> Any:
        """`last` is the argument after the options: return_softmax or deterministic."""
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        return getattr(interface, f"_flash_attn{self.kind}_{direction}")(*tensors, *self.lengths, *self.options, last)


def question(given: Arguments) -> Question | None:
    """What to ask flash-attn; None where there is no query or no key. Waits for the GPU if sequences are packed: their
    lengths must be known here."""
    qkv = given.q, given.k, given.v
    longest_key = given.k.shape[1]
    lengths: tuple = ()
    if given.cu_seqlens_q is not None and given.cu_seqlens_k is not None:
        ends_q, ends_k = given.cu_seqlens_q.tolist(), given.cu_seqlens_k.tolist()
        qkv = given.q[0, : ends_q[-1]], given.k[0, : ends_k[-1]], given.v[0, : ends_k[-1]]
        longest = max(2, *(end - start for start, end in zip(ends_q, ends_q[1:], strict=False)))
        longest_key = max(longest, *(end - start for start, end in zip(ends_k, ends_k[1:], strict=False)))
        cu_seqlens = given.cu_seqlens_q.contiguous(), given.cu_seqlens_k.contiguous()
        lengths = (*cu_seqlens, longest, longest_key)
    if qkv[0].numel() == 0 or qkv[1].numel() == 0:
        return None
    left, right = _window(given)
    slopes = given.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().contiguous()
        if (left, right) == (-1, 0):
            left = longest_key - 1
    q, k, v = (_aligned(x) for x in qkv)
    options = (0.0, given.scale, (left, right) == (-1, 0), left, right, given.softcap, slopes)
    return Question("_varlen" if lengths else "", (q, k, v), lengths, options)


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its elements are not read in place."""
    elements = 16 // x.element_size()
    in_place = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % elements == 0 for step in x.stride()[:-1])
    return x if in_place else x.clone(memory_format=torch.contiguous_format)


def forward(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(y, lse): see `llmsys.attention`."""
    given = Arguments(*args)
    batch, queries, heads, _ = given.q.shape
    asked = question(given)
    if asked is None:
        y = given.q.new_zeros(given.q.shape)
        lse = torch.full((batch, heads, queries), -math.inf, device=y.device)
    else:
        y, lse, *_ = asked.ask("forward", *asked.qkv, last=False)
        lse = torch.where(lse == math.inf, y[..., 0].transpose(-1, -2) - math.inf, lse)  # of a NaN a NaN
        if asked.kind:
            y, lse = _continued(y, 0, queries, 0.0)[None], _continued(lse, 1, queries, -math.inf)[None]
    return (y, lse) if out is None else (out[0].copy_(y), out[1].copy_(lse))


def _continued(x: Tensor, dim: int, size: int, value: float) -> Tensor:
    """`x` with `value` behind its end, up to `size` along `dim`."""
    if x.shape[dim] == size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat((x, x.new_full(shape, value)), dim)


def backward(
    dy: Tensor, dlse: Tensor | None, y: Tensor, lse: Tensor, *args: Any, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dsinks), of the last two no elements."""
    given = Arguments(*args[:-1])
    dq, dk, dv = out or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given[:3])
    none = given.q.new_empty(0), given.q.new_empty(0)
    asked = question(given)
    if asked is None:
        return dq.zero_(), dk.zero_(), dv.zero_(), *none
    gradients = [dq, dk, dv]
    if asked.kind:
        queries, keys = len(asked.qkv[0]), len(asked.qkv[1])
        dy, y, lse = dy[0, :queries], y[0, :queries], lse[0, :, :queries]
        dlse = None if dlse is None else dlse[0, :, :queries]
        for i, size in enumerate((queries, keys, keys)):
            gradients[i][:, size:] = 0
            gradients[i] = gradients[i][0, :size]
    lse = lse.masked_fill(lse == -math.inf, math.inf).contiguous()
    asked.ask("backward", _aligned(dy), *asked.qkv, _aligned(y), lse, *gradients, last=True)
    if dlse is not None:
        for gradient, more in zip(gradients, _through_lse(asked, dlse, lse), strict=False):
            gradient += more
    return dq, dk, dv, *none


def _through_lse(asked: Question, dlse: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What dlse adds to dq and dk. Gradients of scores are probabilities times dlse: as they are where values are one,
    dlse arrives at the output and nothing is taken from it."""
    q, k, _ = asked.qkv
    dy, ones = torch.zeros_like(q), torch.zeros_like(k)
    dy[..., 0], ones[..., 0] = dlse.transpose(-1, -2), 1
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, k))
    asked.ask("backward", dy, q, k, ones, torch.zeros_like(dy), lse, dq, dk, dv, last=True)
    return dq, dk


FLASH_ATTN = Impl("flash_attn", forward, backward, why_not, ("cuda",))
