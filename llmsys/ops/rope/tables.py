"""The angles that `rope` rotates by, in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops.rope.scaling import RopeScaling, plain_frequencies


def rope_tables(
    positions: int | torch.Tensor,
    dim: int,
    *,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angle position · base^(-2i / dim) of each position and pair i.

    With `scaling` (`LinearScaling`, `NTKScaling`, `YarnScaling`, `Llama3Scaling`, or what has their two members), the
    angle is position · scaling.frequencies(dim, base)[i], and cos and sin are multiplied by scaling.attention.

    Shapes     positions: a number T, for 0, 1, … T - 1, or a tensor (T,) or (B, T) of them; dim (even): the elements of
               a head that rotate, R in `rope` → cos, sin (T, dim/2) or (B, T, dim/2) float32, on `device` or where
               positions is
    Numerics   angles in float64, so that cos and sin are right to the last bit at any position
    Errors     ValueError if dim is odd or negative, positions is a negative number, or base is not above 0
    Source     Su et al. 2021, arXiv:2104.09864, section 3.2.2; each scaling names its own
    """
    if dim < 0 or dim % 2:
        raise ValueError(f"llmsys.rope_tables: dim is {dim}, expected an even number: elements rotate in pairs")
    if not base > 0:
        raise ValueError(f"llmsys.rope_tables: base is {base}, expected a number above 0")
    if isinstance(positions, int):
        if positions < 0:
            raise ValueError(f"llmsys.rope_tables: positions is {positions}, expected a number >= 0 or a tensor")
        positions = torch.arange(positions, device=device)
    positions = positions.to(device=device, dtype=torch.float64)
    frequencies = plain_frequencies(dim, base) if scaling is None else scaling.frequencies(dim, base)
    angles = positions[..., None] * frequencies.to(positions.device)
    attention = 1.0 if scaling is None else scaling.attention
    return (angles.cos() * attention).float(), (angles.sin() * attention).float()
