"""Pointwise kernels in Triton: tiles of a few rows and up to 1024 columns, and the launch over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmsys.ops._native import rows_of
from llmsys.ops._triton import device_of, num_warps

TILE = 4096


@triton.jit
def tile_indices(rows, dim, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """row (BLOCK_ROWS, 1), col (1, BLOCK_DIM) and mask of this program's tile; tiles run along the rows first."""
    tiles_per_row = tl.cdiv(dim, BLOCK_DIM)
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles_per_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = program % tiles_per_row * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    return row, col, (row < rows) & (col < dim)


def tile(dim: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_DIM)"""
    block_dim = min(triton.next_power_of_2(dim), 1024)
    return TILE // block_dim, block_dim


def launch(
    kernel: triton.JITFunction,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...],
    *options: float | str,
) -> None:
    """Run a kernel (*inputs, *outputs, rows, dim, *strides, *options, BLOCK_ROWS, BLOCK_DIM) over inputs of equal shape
    into contiguous outputs.
    """
    if outputs[0].numel() == 0:
        return
    dim = outputs[0].shape[-1]
    rows = outputs[0].numel() // dim
    tensors, strides = zip(*(rows_of(x) for x in inputs), strict=True)
    blocks = tile(dim)
    tiles = triton.cdiv(rows, blocks[0]) * triton.cdiv(dim, blocks[1])
    with device_of(tensors[0]):
        kernel[(tiles,)](*tensors, *outputs, rows, dim, *strides, *options, *blocks, num_warps=num_warps(TILE))
