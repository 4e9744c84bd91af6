"""A low-rank update added to its base for good, and taken out again to the last bit."""

from __future__ import annotations

import torch

from llmsys.ops import _check

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def lora_merge(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add scale · lora_b · lora_a to `weight`; what rounding loses of weight is in the remainder.

    Shapes     weight (N, K), lora_a (R, K), lora_b (N, R), of float dtypes → merged (N, K) in weight's dtype, and the
               remainder (N, K), integers of as many bytes: by how many representable numbers weight is above merged
               minus the update
    Numerics   the update is computed in float32 (float64 for a float64 weight) and rounded once, with the sum: merged
               is off by half a unit in its last place, in bfloat16 2⁻⁹ of its size, so that an update below that is
               lost; `lora_unmerge` with the remainder gives weight back bit for bit, in every dtype, where it computes
               the update to the same bits (same machine, same number of threads)
    Cost       2·N·K·R flop; the remainder takes as much memory as weight
    Errors     ValueError if shapes do not fit as above or devices differ; TypeError for other dtypes
    Source     Hu et al. 2021, arXiv:2106.09685, section 4.1 (no additional inference latency)
    """
    update = _update(weight, lora_a, lora_b, scale)
    merged = (weight.to(update.dtype) + update).to(weight.dtype)
    approximate = (merged.to(update.dtype) - update).to(weight.dtype)
    integers = _INTEGERS[weight.element_size()]
    return merged, weight.contiguous().view(integers) - approximate.contiguous().view(integers)


@torch.no_grad()
def lora_unmerge(
    merged: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scale: float,
    remainder: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take the update out of what `lora_merge` gave.

    Shapes     as `lora_merge` → weight (N, K)
    Numerics   with the remainder, the weight that was merged, bit for bit; without, off by up to the rounding of merged
               and one of its own: a unit in the last place of the larger of weight and merged
    Cost       2·N·K·R flop
    Errors     ValueError if shapes do not fit as above or devices differ; TypeError for other dtypes
    Source     Hu et al. 2021, arXiv:2106.09685, section 4.1 (recover the base by subtracting)
    """
    update = _update(merged, lora_a, lora_b, scale)
    weight = (merged.to(update.dtype) - update).to(merged.dtype).contiguous()
    if remainder is None:
        return weight
    return (weight.view(remainder.dtype) + remainder).view(merged.dtype)


def _update(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.dtype not in _check.FLOATS:
            raise TypeError(
                f"llmsys.lora_merge: {name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64"
            )
        if tensor.device != weight.device:
            raise ValueError(
                f"llmsys.lora_merge: {name} is on {tensor.device} and weight on {weight.device}, expected one device"
            )
    matrices = weight.dim() == lora_a.dim() == lora_b.dim() == 2
    if not matrices or weight.shape != (len(lora_b), lora_a.shape[1]) or len(lora_a) != lora_b.shape[1]:
        raise ValueError(
            f"llmsys.lora_merge: weight has shape {tuple(weight.shape)}, lora_a {tuple(lora_a.shape)} and lora_b "
            f"{tuple(lora_b.shape)}, expected (N, K), (R, K) and (N, R)"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (lora_b.to(wide) @ lora_a.to(wide)).mul_(scale)
