"""`llmsys.rope` against PyTorch and whatever else is installed."""

import torch

from benchmarks import peers
from benchmarks.harness import bench_op
from llmsys.ops.rope import OP, cases


def formula(x, cos, sin, interleaved):
    half = cos.shape[-1]
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotating, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rotating[..., 0::2], rotating[..., 1::2]) if interleaved else rotating.split(half, -1)
    pair = a * c - b * s, b * c + a * s
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)


BENCH = bench_op(OP, cases, formula, peers.ROPE)


def test_rope(benchmark, contestant):
    benchmark(contestant)
