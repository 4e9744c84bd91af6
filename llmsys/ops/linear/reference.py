"""Linear in plain PyTorch."""

from __future__ import annotations

from functools import partial

import torch

from llmsys.ops import _activation_reference as reference
from llmsys.ops._activation_reference import Formula

Wide = torch.Tensor  # in float32, or float64


ACTIVATIONS: dict[str, tuple[Formula, Formula]] = {
    "relu": (reference.relu, reference.relu_slope),
    "relu2": (reference.relu2, reference.relu2_slope),
    "silu": (reference.silu, reference.silu_slope),
    "gelu": (partial(reference.gelu, approximate="none"), partial(reference.gelu_slope, approximate="none")),
    "gelu_tanh": (partial(reference.gelu, approximate="tanh"), partial(reference.gelu_slope, approximate="tanh")),
}


def activate(z: Wide, activation: str | None) -> Wide:
    return z if activation is None else ACTIVATIONS[activation][0](z)


def slope(z: Wide, activation: str) -> Wide:
    """The derivative of `activate` at z."""
    return ACTIVATIONS[activation][1](z)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: torch.dtype) -> Wide:
    z = torch.matmul(x.to(wide), weight.to(wide).t())
    return z if bias is None else z + bias.to(wide)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, pre): see `llmsys.linear`; pre is what the activation is applied to, without elements where there is none."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = _product(x, weight, bias, wide)
    pre = x.new_empty(0) if activation is None else z.to(x.dtype)
    y = activate(z, activation)
    if residual is not None:
        y = y + residual.to(wide)
    y = y.to(x.dtype).contiguous()
    return (y if out is None else out.copy_(y)), pre


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias), without elements where not needed; `out`, where given, is dx. Where a gradient is recorded,
    `pre` is computed anew, so that this function can itself be differentiated."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dz = dy.to(wide)
    if activation is not None:
        if torch.is_grad_enabled():
            pre = _product(x, weight, bias, wide).to(x.dtype)
        dz = dz * slope(pre.to(wide), activation)
    dz_rows, x_rows = (torch.atleast_2d(tensor).flatten(0, -2) for tensor in (dz, x.to(wide)))
    nothing = x.new_empty(0)
    dx = torch.matmul(dz, weight.to(wide)).to(x.dtype).contiguous() if needs_dx else nothing
    dweight = (dz_rows.t() @ x_rows).to(x.dtype).contiguous() if needs_dweight else nothing
    dbias = dz_rows.sum(0).to(x.dtype) if needs_dbias else nothing
    return (dx if out is None or not needs_dx else out.copy_(dx)), dweight, dbias
