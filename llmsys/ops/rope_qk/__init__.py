"""Rotary position embedding of queries and keys in one pass: the contract."""

from __future__ import annotations

import torch

from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.rope import check_arguments, check_out
from llmsys.ops.rope_qk import native, reference

OP = Op(
    "rope_qk",
    forward="(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved=False) -> (Tensor q_out, Tensor k_out)",
    backward="(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, bool interleaved) -> (Tensor dq, Tensor dk)",
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.rope_qk.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def rope_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their token's position, in one pass.

        q_out = rope(q, cos, sin),   k_out = rope(k, cos, sin)

    Shapes     q (B, T, Hq, K), k (B, T, Hk, K) of one float16/bfloat16/float32/float64, any strides, such as views of
               a fused projection; cos, sin as in `rope` → q_out, k_out, shaped alike, contiguous; `out`, where given,
               is both, each contiguous or q or k itself, whatever its strides
    Numerics   as `rope`
    Gradient   dq, dk, the rotation back; saves cos and sin, not q and k; none for cos and sin
    Cost       2·N·K·itemsize bytes and the tables once, 3·N·R flop (N = B·T·(Hq + Hk)): bandwidth-bound
    Errors     as `rope`, and ValueError if q and k differ in B, T or K, TypeError if in dtype
    Source     Su et al. 2021, arXiv:2104.09864, eq. 15 (interleaved); pairs (i, i + R/2) as in GPT-NeoX,
               arXiv:2204.06745, and Llama in Hugging Face transformers
    """
    check_arguments("rope_qk", q, cos, sin, "q")
    if k.dtype is not q.dtype:
        raise TypeError(f"llmsys.rope_qk: k is {k.dtype}, expected {q.dtype}, as q is")
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or k.device != q.device:
        raise ValueError(
            f"llmsys.rope_qk: k has shape {tuple(k.shape)} on {k.device} and q {tuple(q.shape)} on {q.device}, "
            "expected q (B, T, Hq, K) and k (B, T, Hk, K) on one device"
        )
    if out is not None:
        check_out("rope_qk", out[0], q)
        check_out("rope_qk", out[1], k)
    return OP(q, k, cos, sin, interleaved, out=out)
