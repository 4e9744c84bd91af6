"""What tells an attention where tokens are, other than rotation: slopes of ALiBi and tables of sines."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The slopes of `llmsys.attention`'s alibi_slopes, (num_heads,) float32.

        slope[h] = 2^(−8 (h + 1) / n)    for n heads, a power of two

    Of another number of heads the first are those of the power of two below it, and the rest every other one of twice
    that power, from its first.

    Errors     ValueError if num_heads is below 1
    Source     Press et al. 2021, arXiv:2108.12409, section 3; other numbers of heads as in its authors' code
    """
    if num_heads < 1:
        raise ValueError(f"llmsys.nn.alibi_slopes: num_heads is {num_heads}, expected an integer above 0")
    power = 1 << (num_heads.bit_length() - 1)
    steps = [8 * (head + 1) / power for head in range(power)]
    steps += [8 * (2 * head + 1) / (2 * power) for head in range(num_heads - power)]
    return torch.tensor([2.0**-step for step in steps], dtype=torch.float32, device=device)


def sinusoidal_positions(
    length: int,
    dim: int,
    *,
    base: float = 10_000.0,
    interleaved: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What is added to the embeddings of `length` tokens, (length, dim).

        table[p, 2i] = sin(p / base^(2i/dim)),    table[p, 2i + 1] = cos(p / base^(2i/dim))

    With interleaved=False all sines come first, and the cosines behind them. Angles are computed in float64 and the
    table is rounded once, so that a row is the same whatever the length.

    Errors     ValueError if length is negative, dim odd or below 2, or base not above 0
    Source     Vaswani et al. 2017, arXiv:1706.03762, section 3.5
    """
    if length < 0:
        raise ValueError(f"llmsys.nn.sinusoidal_positions: length is {length}, expected 0 or more")
    if dim < 2 or dim % 2:
        raise ValueError(f"llmsys.nn.sinusoidal_positions: dim is {dim}, expected an even number above 0")
    if not base > 0:
        raise ValueError(f"llmsys.nn.sinusoidal_positions: base is {base}, expected a number above 0")
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * base ** (-pairs / dim)
    table = torch.stack((angles.sin(), angles.cos()), -1 if interleaved else -2)
    return table.flatten(1).to(dtype)
