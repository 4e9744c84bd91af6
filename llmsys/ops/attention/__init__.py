"""Attention: the contract."""

from __future__ import annotations

import math

from torch import Tensor

from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.attention import arguments, flash_attn, native, reference

OP = Op(
    "attention",
    forward="(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? sinks=None, Tensor? alibi_slopes=None,"
    " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? block_mask=None, int block_size=64,"
    " int window_left=-1, int window_right=-1, float scale=1.0, float softcap=0.0, float dropout_p=0.0, int seed=0)"
    " -> (Tensor y, Tensor lse)",
    backward="(Tensor dy, Tensor? dlse, Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? bias,"
    " Tensor? sinks, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_mask,"
    " int block_size, int window_left, int window_right, float scale, float softcap, float dropout_p, int seed,"
    " bool needs_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.attention.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
        # An optional peer, which runs where it is forced. No GPU has a record of it beside our kernels. Before them it
        # would change results with what is installed, and packed sequences would wait for the GPU.
        flash_attn.FLASH_ATTN,
    ],
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: int = 64,
    dropout_p: float = 0.0,
    seed: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """For each query, the mean of the values, weighted by the softmax of its scores with the keys that it sees.

        z[t, s] = scale · q[t]·k[s], then softcap · tanh(z / softcap), then − alibi_slope · |place(t) − s| + bias[t, s]
        lse[t] = log(Σ_s e^z[t, s] + e^sink),    y[t] = Σ_s e^(z[t, s] − lse[t]) · v[s],    s over what t sees

    place(t) = t + S − T: both sequences end together. A query sees the keys from place − left to place + right of
    `window` = (left, right), -1 for all; with `causal` none after its place; of those, the ones that
    block_mask[t // block_size, s // block_size] lets through. Encoder, decoder and cross attention are all this.

    Shapes     q (B, T, H, D), k (B, S, K, D), v (B, S, K, E), any strides, H a multiple of K (query head h reads key
               head h // (H/K)), D, E from 1 to 256 → y (B, T, H, E), contiguous; with return_lse (y, lse), lse
               (B, H, T) float32 (float64 for float64). scale 1/√D where None. alibi_slopes (H,) or (B, H); sinks (H,);
               bias (B, H, T, S), any of them 1; block_mask bool (B or 1, H or 1, ⌈T/block_size⌉, ⌈S/block_size⌉).
               Packed sequences: q (total_q, H, D), k and v (total_k, K, ·), with cu_seqlens_q and cu_seqlens_k int32
               (N + 1,) where each starts and the last one ends; each sees its own keys alone; alibi_slopes (N, H);
               → y (total_q, H, E), lse (H, total_q)
    Numerics   scores, softmax and sums in float32 (float64 for float64); of 16-bit inputs probabilities may be rounded
               to their dtype before they are multiplied with v; y rounded once. A query that sees nothing, or nothing
               but −inf, has y 0 and lse −inf. What is not seen may be anything, but for NaN and ±inf in v, k and q
    Dropout    a probability of place n = (((b·H + h)·T) + t)·⌈S/4⌉·4 + s is 0 where word n of `llmsys.dropout` with
               `seed` says so, and divided by 1 − dropout_p elsewhere; lse is without
    Gradient   dq, dk, dv, dbias, dsinks, from y and lse; saves q, k, v, y, lse and what else is given; scores are
               computed again; the same bits every time
    Cost       2·P·H·(D + E) flop for P pairs that see each other, backward 2.5 times that; memory beyond inputs and
               outputs grows with T and S, not with their product
    Errors     ValueError if shapes, devices or options do not fit as above; TypeError for a dtype not named above
    Source     Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691; ALiBi: Press et al. 2021,
               arXiv:2108.12409; softcap: Gemma 2, arXiv:2408.00118, section 2; sinks: Xiao et al. 2023,
               arXiv:2309.17453, as gpt-oss learns them, arXiv:2508.10925, section 2.3; block masks: BigBird,
               arXiv:2007.14062
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    arguments.check_tensors(q, k, v, 3 if packed else 4)
    arguments.check_options(window, block_size, softcap, dropout_p, seed)
    sequences = q.shape[0]
    if packed:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            missing = "cu_seqlens_k" if cu_seqlens_k is None else "cu_seqlens_q"
            raise ValueError(f"llmsys.attention: {missing} is None, expected both of cu_seqlens_q and cu_seqlens_k")
        arguments.check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k)
        sequences = cu_seqlens_q.shape[0] - 1
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    arguments.check_optional(q, k, bias, sinks, alibi_slopes, sequences)
    if block_mask is not None:
        arguments.check_block_mask(q, k, block_mask, block_size)
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[1], k.shape[1])
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(sequences, -1)
    left, right = window
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    seed = 0 if seed is None else seed
    y, lse = OP(
        *(q, k, v, bias, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_mask, block_size),
        *(left, 0 if causal else right, float(scale), float(softcap), float(dropout_p)),
        seed if seed < 2**63 else seed - 2**64,
    )
    if packed:
        y, lse = y.squeeze(0), lse.squeeze(0)
    return (y, lse) if return_lse else y
