"""The dtype that weights and activations are kept in while training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`dtype` of weights, activations and gradients; the optimizer's state, master weights included, is float32."""

    dtype: torch.dtype
    reason: str


def choose_precision(precision: str, gemm_rate: Callable[[torch.dtype], float]) -> Precision:
    """The dtype that `precision` names; "auto" is the one whose matrix products `gemm_rate` finds faster, in flop/s.

    On a CPU without AVX-512 bfloat16 products are up to ten times slower than float32 ones.
    """
    if precision != "auto":
        return Precision({"float32": torch.float32, "bfloat16": torch.bfloat16}[precision], "as configured")
    float32, bfloat16 = gemm_rate(torch.float32), gemm_rate(torch.bfloat16)
    measured = f"measured matrix products: float32 {float32 / 1e9:.0f}, bfloat16 {bfloat16 / 1e9:.0f} GFLOP/s"
    return Precision(torch.bfloat16 if bfloat16 > float32 else torch.float32, measured)
