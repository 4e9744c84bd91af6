"""Attention: inputs, sizes, cost."""

from __future__ import annotations

import math

import torch

from llmsys.ops._cases import random
from llmsys.ops.attention.arguments import Arguments
from llmsys.ops.attention.bounds import row_bounds

# A shape is (B, T, S, H, K, D, E): sequences, queries, keys, query heads, key heads, head dims of q and k, and of v.
SMALL = (
    *((0, 3, 3, 1, 1, 8, 8), (1, 0, 5, 2, 1, 8, 8), (2, 4, 0, 2, 2, 5, 3)),
    *((1, 1, 1, 1, 1, 1, 1), (1, 3, 3, 1, 1, 7, 7), (1, 15, 17, 2, 1, 16, 16), (1, 40, 33, 1, 1, 96, 96)),
    *((2, 17, 31, 4, 2, 33, 20), (1, 70, 70, 2, 1, 256, 64), (1, 29, 260, 3, 1, 32, 32), (1, 150, 150, 2, 1, 64, 64)),
    (1, 75, 70, 2, 1, 24, 16),
)
LARGE = (
    *((1, 2048, 2048, 16, 16, 128, 128), (1, 1024, 1024, 16, 16, 64, 64)),
    *((1, 4096, 4096, 8, 8, 64, 64), (2, 2048, 2048, 32, 8, 128, 128)),
)
EDGES = ((1, 512, 512, 4, 4, 80, 80), (1, 512, 512, 4, 1, 256, 256))
VARIANTS: tuple[dict, ...] = (
    {},
    {"causal": False},
    {"window": (5, 0)},
    {"causal": False, "window": (7, 4)},
    {"scale": -0.4},
    {"spread": 6.0},
    {"softcap": 2.0},
    {"alibi": True},
    {"sinks": True},
    {"bias": "full"},
    {"bias": "head"},
    {"bias": "padding", "causal": False},
    {"dropout_p": 0.3},
    {"packed": True},
    {"packed": True, "causal": False, "alibi": True},
    {"block_mask": True, "causal": False},
    {"softcap": 3.0, "alibi": True, "sinks": True, "bias": "full", "dropout_p": 0.1, "window": (40, 0)},
)
# What makes other Triton kernels: everything at once, and a block mask; the rest are data to them, or less of the same.
COMPILED = ({"block_mask": True, "causal": False}, VARIANTS[-1])


def shape(*size: int) -> tuple[int, ...]:
    """The case for a (…, D) that all ops are given: as many queries as it has rows, and three keys more."""
    *rows, dim = size
    batch, queries = (rows[0], rows[-1]) if len(rows) > 1 else (1, rows[0])
    dim = min(dim, 256)
    return batch, queries, queries + 3, 2, 1, dim, dim


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    spread: float = 1.0,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    bias: str = "",  # "full" (B, H, T, S), "head" (1, H, T, S), "padding" (B, 1, 1, S) that hides keys
    dropout_p: float = 0.0,
    packed: bool = False,  # the queries as sequences of unequal lengths, one empty
    block_mask: bool = False,
) -> tuple:
    """Forward arguments in schema order; `spread` multiplies q."""
    batch, queries, keys, heads, kv_heads, dim, value_dim = shape
    if packed:
        batch = 1
    cu_q, cu_k = (_starts(size, device) if packed else None for size in (queries, keys))
    sequences = 5 if packed else batch
    biases = {"": (0,), "full": (batch, heads, queries, keys), "head": (1, heads, queries, keys)}
    q, k, v, b, sink, slopes, drawn = random(
        *(seed, device, ((batch, queries, heads, dim), dtype), ((batch, keys, kv_heads, dim), dtype)),
        *(((batch, keys, kv_heads, value_dim), dtype), (biases.get(bias, (batch, 1, 1, keys)), dtype)),
        *(((heads,), torch.float32), ((sequences, heads), torch.float32)),
        ((1, heads, -(-queries // 16), -(-keys // 16)), torch.float32),
    )
    if bias == "padding":
        b = torch.where(b < 0, -torch.inf, 0.0).to(dtype).expand(-1, -1, queries, -1)
    right = 0 if causal else window[1]
    return (
        *(q * spread, k, v, b if bias else None, sink if sinks else None, slopes.abs() if alibi else None, cu_q, cu_k),
        *(drawn > 0 if block_mask else None, 16 if block_mask else 64, window[0], right),
        *(1 / math.sqrt(dim) if scale is None else scale, softcap, dropout_p, 11),
    )


def _starts(size: int, device: str) -> torch.Tensor:
    """Where five sequences of `size` tokens start, the third empty, and end, one token before the last."""
    ends = [0, size // 7, size // 3, size // 3, size // 2, max(size - 1, size // 2)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def pairs(*args: object) -> int:
    """Queries and keys that see each other, over all heads; a block mask is not counted."""
    given = Arguments(*args)  # type: ignore[arg-type]
    if given.q.device.type == "meta":
        return given.q.shape[0] * given.q.shape[2] * given.q.shape[1] * given.k.shape[1]
    rows = row_bounds(given)
    return int((rows[1] - rows[0]).sum()) * given.q.shape[0] * given.q.shape[2]


def traffic(direction: str, *args: object) -> int:
    """Bytes that must move: q, k and v in, y out; backward those and dy in, and the gradients out."""
    given = Arguments(*args)  # type: ignore[arg-type]
    inputs = given.q.numel() + given.k.numel() + given.v.numel()
    outputs = given.q.shape[:-1].numel() * given.v.shape[-1]
    elements = inputs + outputs if direction == "forward" else 2 * inputs + 2 * outputs
    return elements * given.q.element_size()


def flops(direction: str, *args: object) -> int:
    """A product and a sum for each pair and element: two matrix products forward; backward five, scores among them."""
    given = Arguments(*args)  # type: ignore[arg-type]
    dim, value_dim = given.q.shape[-1], given.v.shape[-1]
    return 2 * pairs(*args) * (dim + value_dim if direction == "forward" else 3 * dim + 2 * value_dim)
