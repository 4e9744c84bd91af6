"""The arguments of attention by name, and whether they fit each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmsys.ops import _check

MAX_HEAD_DIM = 256


class Arguments(NamedTuple):
    """Those of the op, in the order of its schema. q (B, T, H, D), k (B, S, K, D), v (B, S, K, E)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # (B or 1, H or 1, T, S)
    sinks: Tensor | None  # (H,)
    alibi_slopes: Tensor | None  # (B, H); of packed sequences, a row for each
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    block_mask: Tensor | None  # (B or 1, H or 1, ceil(T / block_size), ceil(S / block_size))
    block_size: int
    window_left: int  # keys seen before a query's own place, -1 for all
    window_right: int
    scale: float
    softcap: float  # 0 for none
    dropout_p: float
    seed: int


def check_tensors(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    """q, k and v of one dtype and device, of `dims` dimensions, that fit each other."""
    if q.dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.attention: q is {q.dtype}, expected float32, bfloat16, float16 or float64")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"llmsys.attention: {name} is {tensor.dtype}, expected {q.dtype}, as q is")
        if tensor.device != q.device:
            raise ValueError(f"llmsys.attention: {name} is on {tensor.device}, expected {q.device}, as q is")
    shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    layout = "q (B, T, H, D), k (B, S, K, D) and v (B, S, K, E)"
    if dims == 3:
        layout = "with cu_seqlens q (total_q, H, D), k (total_k, K, D) and v (total_k, K, E)"
    if not q.dim() == k.dim() == v.dim() == dims or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"llmsys.attention: {shapes}, expected {layout}")
    if dims == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"llmsys.attention: {shapes}, expected one batch size B: {layout}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"llmsys.attention: {shapes}, expected H={heads} to be a multiple of K={kv_heads}, above 0")
    for name, dim in (("D", q.shape[-1]), ("E", v.shape[-1])):
        if not 0 < dim <= MAX_HEAD_DIM:
            raise ValueError(f"llmsys.attention: {shapes}, expected a head dim {name} from 1 to {MAX_HEAD_DIM}")


def check_cu_seqlens(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Both int32 (N + 1,), from 0, never falling, to at most the number of tokens (which a GPU is not asked)."""
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"llmsys.attention: cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)} and cu_seqlens_k "
            f"{tuple(cu_seqlens_k.shape)}, expected (N + 1,) for the same N sequences"
        )
    for name, tensor, total in (("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        if tensor.dtype != torch.int32:
            raise TypeError(f"llmsys.attention: {name} is {tensor.dtype}, expected torch.int32")
        if tensor.device != q.device:
            raise ValueError(f"llmsys.attention: {name} is on {tensor.device}, expected {q.device}, as q is")
        if tensor.dim() != 1 or tensor.shape[0] < 2:
            raise ValueError(f"llmsys.attention: {name} has shape {tuple(tensor.shape)}, expected (N + 1,) with N > 0")
        if not tensor.is_cpu or torch.compiler.is_compiling() or type(tensor) is not Tensor:
            continue
        if tensor[0] != 0 or tensor[-1] > total or bool((tensor.diff() < 0).any()):
            raise ValueError(
                f"llmsys.attention: {name} is {tensor.tolist()} for {total} tokens, expected numbers from 0 that never "
                "fall and end at the number of tokens or below"
            )


def check_options(window: tuple[int, int], block_size: int, softcap: float, dropout_p: float, seed: int | None) -> None:
    """Each by itself."""
    if not isinstance(block_size, int) or not 0 < block_size < 2**31:
        raise ValueError(f"llmsys.attention: block_size is {block_size}, expected an integer above 0, below 2**31")
    if len(window) != 2 or not all(isinstance(size, int) and -1 <= size < 2**63 for size in window):
        raise ValueError(
            f"llmsys.attention: window is {window}, expected (left, right) numbers of keys seen before and after the "
            "query's own place, -1 for all"
        )
    if not softcap >= 0:
        raise ValueError(f"llmsys.attention: softcap is {softcap}, expected a number above 0, or 0 for none")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"llmsys.attention: dropout_p is {dropout_p}, expected a probability in [0, 1)")
    if dropout_p and seed is None:
        raise ValueError(f"llmsys.attention: dropout_p is {dropout_p} and seed None, expected a seed with dropout")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"llmsys.attention: seed is {seed}, expected an integer in [-2**63, 2**64)")


def check_optional(
    q: Tensor, k: Tensor, bias: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None, sequences: int
) -> None:
    """Tensors that change scores; q and k of four dimensions."""
    batch, queries, heads, keys = *q.shape[:3], k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, tensor, shapes in (
        ("bias", bias, None),
        ("sinks", sinks, [(heads,)]),
        ("alibi_slopes", alibi_slopes, [(heads,), (sequences, heads)]),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in (q.dtype, wide):
            raise TypeError(f"llmsys.attention: {name} is {tensor.dtype}, expected {q.dtype} (q's) or {wide}")
        if tensor.device != q.device:
            raise ValueError(f"llmsys.attention: {name} is on {tensor.device}, expected {q.device}, as q is")
        if shapes is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"llmsys.attention: {name} has shape {tuple(tensor.shape)}, expected one of {shapes}")
    full = (batch, heads, queries, keys)
    if bias is not None and (
        bias.dim() != 4 or any(given not in (1, size) for given, size in zip(bias.shape, full, strict=True))
    ):
        raise ValueError(
            f"llmsys.attention: bias has shape {tuple(bias.shape)}, expected (B, H, T, S) = {full}, any of them 1"
        )
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("llmsys.attention: alibi_slopes requires a gradient, expected one that does not; .detach() it")


def check_block_mask(q: Tensor, k: Tensor, block_mask: Tensor, block_size: int) -> None:
    """Blocks of keys that blocks of queries see; q and k of four dimensions."""
    if block_mask.dtype != torch.bool:
        raise TypeError(f"llmsys.attention: block_mask is {block_mask.dtype}, expected torch.bool")
    full = (q.shape[0], q.shape[2], -(-q.shape[1] // block_size), -(-k.shape[1] // block_size))
    fits = block_mask.dim() == 4 and block_mask.shape[2:] == full[2:]
    if not fits or block_mask.shape[0] not in (1, full[0]) or block_mask.shape[1] not in (1, full[1]):
        raise ValueError(
            f"llmsys.attention: block_mask has shape {tuple(block_mask.shape)}, expected (B or 1, H or 1, "
            f"ceil(T / block_size), ceil(S / block_size)) = {full}"
        )
    if block_mask.device != q.device:
        raise ValueError(f"llmsys.attention: block_mask is on {block_mask.device}, expected {q.device}, as q is")
