"""How large the tiles of the attention kernels are: as large as registers and shared memory of a GPU allow."""

from __future__ import annotations

import torch

from llmsys.ops import _triton
from llmsys.ops.attention.arguments import Arguments

# (queries, keys, warps, stages) for head dims up to 64, 128 and 256, and for any where something changes scores one by
# one, which takes registers; of 16-bit inputs by kernel. Of float32 all kernels have the same tiles, and so sum the
# products of a score in one order: where scores are large, p = e^(score - lse) is as exact as forward and backward
# agree. What stands under sm_80 stays within the 99 KiB of shared memory that the smaller GPUs of its kind have.
TILES = {
    "sm_80": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),
        "query": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        "key": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        "bias": ((32, 32, 8, 1),) * 4,
        "float32": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "sm_90": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
        "query": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        "key": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        "bias": ((32, 32, 8, 1),) * 4,
        "float32": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "gfx942": {
        "forward": ((128, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 1), (64, 32, 4, 1)),
        "query": ((64, 32, 4, 1), (64, 32, 8, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
        "key": ((32, 64, 4, 1), (32, 64, 8, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        "bias": ((32, 16, 4, 1),) * 4,
        "float32": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}
INTERPRETED_TILE = (64, 32, 4, 1)  # the interpreter takes its time by the operation, hardly by the size of the tile


def tile_sizes(kernel: str, given: Arguments, width: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of `kernel` for head dims up to `width`."""
    if given.q.is_cpu:
        return INTERPRETED_TILE
    changed = any(tensor is not None for tensor in (given.bias, given.alibi_slopes, given.block_mask))
    choice = 0 if width <= 64 else 1 if width <= 128 else 2
    if changed or given.softcap or given.dropout_p:
        choice = 3
    kernels = TILES[_triton.architecture(given.q.device)]
    return kernels["float32" if given.q.dtype == torch.float32 else kernel][choice]
