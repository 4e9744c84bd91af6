"""How large the tiles of the attention kernels are: as large as registers and shared memory of a GPU allow."""

from __future__ import annotations

import torch

from llmsys.ops import _triton
from llmsys.ops.attention.arguments import Arguments

# (queries, keys, warps, stages) for head dims up to 64, 128 and 256, of 16-bit inputs by kernel. Of float32 all kernels
# have the same tiles, and so sum the products of a score in one order: where scores are large, p = e^(score - lse) is
# as exact as forward and backward agree. What stands under sm_80 stays within the 99 KiB of shared memory that the
# smaller GPUs of its kind have.
TILES = {
    "sm_80": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        "query": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
        "key": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "bias": ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
        "float32": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    },
    "sm_90": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "query": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        "key": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 32, 8, 2)),
        "bias": ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
        "float32": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    },
    "gfx942": {
        "forward": ((128, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 1)),
        "query": ((64, 32, 4, 1), (64, 32, 8, 1), (32, 16, 4, 1)),
        "key": ((32, 64, 4, 1), (32, 64, 8, 1), (16, 32, 4, 1)),
        "bias": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
        "float32": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}


def tile_sizes(kernel: str, given: Arguments, width: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of `kernel` for head dims up to `width`.

    Whatever changes scores one by one takes registers, as the widest heads do.
    """
    changed = (
        given.softcap
        or given.dropout_p
        or any(tensor is not None for tensor in (given.bias, given.alibi_slopes, given.block_mask))
    )
    choice = 2 if changed or width > 128 else 1 if width > 64 else 0
    kinds = TILES[_triton.architecture(given.q.device)]
    return kinds["float32" if given.q.dtype == torch.float32 else kernel][choice]
