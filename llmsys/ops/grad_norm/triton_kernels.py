"""Gradient norm in Triton: a launch for all tensors of a dtype leaves the sum of each chunk; one more adds them up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import dense
from llmsys.ops._list_triton import TL_DTYPE, at, find_block, tables
from llmsys.ops._triton import device_of, load, num_warps

CHUNK = 8192
PARTS = 4096  # chunks whose sums are added in one go


@triton.jit
def sum_of_squares(address, start, numel, DTYPE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    offset = start + tl.arange(0, CHUNK)
    x = load(at(address, DTYPE, offset, WHOLE), tl.full((CHUNK,), True, tl.int1) if WHOLE else offset < numel)
    return tl.sum(x * x, axis=0)


@triton.jit
def chunk_kernel(table_ptr, num_tensors, parts_ptr, DTYPE: tl.constexpr, TENSORS: tl.constexpr, CHUNK: tl.constexpr):
    tensor, start = find_block(table_ptr, num_tensors, TENSORS, CHUNK)
    numel = tl.load(table_ptr + num_tensors + tensor)
    address = tl.load(table_ptr + 2 * num_tensors + tensor)
    if (start + CHUNK <= numel) & (address % 16 == 0):
        part = sum_of_squares(address, start, numel, DTYPE, CHUNK, True)
    else:
        part = sum_of_squares(address, start, numel, DTYPE, CHUNK, False)
    tl.store(parts_ptr + tl.program_id(0), part)


@triton.jit
def norm_kernel(parts_ptr, norm_ptr, num_parts, PARTS: tl.constexpr):
    total = tl.zeros((PARTS,), tl.float64)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(parts_ptr + part, mask=part < num_parts, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


@torch.no_grad()
def forward(tensors: list[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device
    norm = torch.empty((), dtype=torch.float32, device=device)
    chunks = sum(triton.cdiv(tensor.numel(), CHUNK) for tensor in tensors)
    parts = torch.empty(chunks, dtype=torch.float32, device=device)
    with device_of(norm):
        first = 0
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            of_dtype = dense([tensor for tensor in tensors if tensor.dtype == dtype])
            for table, programs, total in tables([of_dtype], block=CHUNK):
                chunk_kernel[(total,)](
                    table, len(programs), parts[first:], TL_DTYPE[dtype], triton.next_power_of_2(len(programs)), CHUNK,
                    num_warps=num_warps(CHUNK),
                )  # fmt: skip
                first += total
        norm_kernel[(1,)](parts, norm, chunks, PARTS, num_warps=num_warps(PARTS))
    return norm
