"""Embedding: the contract."""

from __future__ import annotations

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, Op, triton
from llmsys.ops.embedding import native, reference

OP = Op(
    "embedding",
    forward="(Tensor weight, Tensor ids, int? padding_idx=None) -> (Tensor y)",
    backward="(Tensor dy, Tensor weight, Tensor ids, int? padding_idx) -> (Tensor dweight)",
    implementations=[
        native.CPU,
        triton("llmsys.ops.embedding.triton_kernels"),
        Impl("reference", reference.forward, reference.backward),
    ],
)


def embedding(
    ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The row of `weight` for each of `ids`, in the argument order of `torch.nn.functional.embedding`.

        y[..., d] = weight[ids[...], d]

    Shapes     ids (...) int64/int32, any strides; weight (V, D) float16/bfloat16/float32/float64, any strides
               → y (..., D), contiguous; `out`, where given, is y
    Numerics   y copied; dweight summed in float32 (float64 for float64) in the order of ids and rounded once: the same
               bits every time, whatever the number of threads
    Gradient   dweight (V, D), every row written; of row `padding_idx` (from the end where negative), zero; saves ids,
               and weight for its shape
    Cost       2·N·D·itemsize + 8·N bytes forward, (N + V)·D·itemsize + 8·N backward (N ids): bandwidth-bound
    Errors     IndexError if an id is not in [0, V): on the CPU at the call, with the id and its place; on a GPU, whose
               work is not waited for, as the device's assertion, and nothing is read outside. ValueError if shapes do
               not fit as above, devices differ, padding_idx is outside [-V, V) or out does not fit; TypeError for a
               dtype not named above
    Source     Bengio et al. 2003, JMLR 3, section 2 (the matrix C)
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"llmsys.embedding: ids is {ids.dtype}, expected torch.int64 or torch.int32")
    if weight.dtype not in _check.FLOATS:
        raise TypeError(f"llmsys.embedding: weight is {weight.dtype}, expected float32, bfloat16, float16 or float64")
    if weight.dim() != 2:
        raise ValueError(f"llmsys.embedding: weight has shape {tuple(weight.shape)}, expected (V, D)")
    if ids.device != weight.device:
        raise ValueError(f"llmsys.embedding: ids is on {ids.device} and weight on {weight.device}, expected one device")
    rows, dim = weight.shape
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"llmsys.embedding: padding_idx is {padding_idx}, expected a number in [{-rows}, {rows})")
    padding_idx = None if padding_idx is None else padding_idx % rows
    if out is not None:
        _check.out("embedding", out, weight.new_empty(()).expand(*ids.shape, dim))
    return OP(weight, ids, padding_idx, out=out)
