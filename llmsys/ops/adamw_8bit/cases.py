"""AdamW with 8-bit block-wise states: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random
from llmsys.ops.adamw import cases as adamw
from llmsys.ops.adamw_8bit.dynamic_map import encode

# A shape here is the sizes of a list's tensors.
SMALL = ((0,), (1,), (7, 8, 9), (255, 256, 257), (300, 0, 3))
LARGE = adamw.LARGE
VARIANTS = tuple(variant for variant in adamw.VARIANTS if "stochastic_rounding" not in variant)


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, **options: object
) -> tuple[object, ...]:
    """Forward arguments in schema order: those of `adamw`, the moments spread over seven decades, then encoded."""
    params, grads, ms, vs, *rest, _ = adamw.inputs(shape, dtype, device, seed, **options)  # type: ignore[arg-type]
    decades = random(seed + 1, device, *(((size,), m.dtype) for size, m in zip(shape, ms, strict=True)))
    if device != "meta":
        ms = [m * 10 ** (-2 * d.abs()) for m, d in zip(ms, decades, strict=True)]
        vs = [v * 10 ** (-2 * d.abs()) for v, d in zip(vs, decades, strict=True)]
    encoded = [[encode(tensor, signed) for tensor in tensors] for tensors, signed in ((ms, True), (vs, False))]
    codes, scales = ([[pair[i] for pair in pairs] for pairs in encoded] for i in range(2))
    return params, grads, *codes, *scales, *rest


def traffic(direction: str, params: list, grads: list, *lists: object) -> int:
    """Bytes that must move: codes, scales and p in and out, grads in; with masters, params out too."""
    states = [tensor for tensors in lists[:4] for tensor in tensors]  # type: ignore[attr-defined]
    masters: list = lists[4]  # type: ignore[assignment]
    return 2 * _bytes([*states, *(masters or params)]) + _bytes(grads) + (_bytes(params) if masters else 0)


def flops(direction: str, params: list, *_: object) -> int:
    """AdamW's 14; a sum, two products to decode each moment; two products, a sum and eight comparisons to encode it."""
    return 36 * sum(param.numel() for param in params)


def _bytes(tensors: list) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
