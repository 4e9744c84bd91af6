"""Linear on PyTorch's own GEMM, for the devices and types where that is the faster one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llmsys.ops._matmul import rows, torch_matmul
from llmsys.ops.linear import reference
from llmsys.ops.sink import Product, made


def why_not(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> str | None:
    """A square doubles the rounding error of what it is given; the other activations hardly stretch it."""
    return f"PyTorch rounds the product to {x.dtype} before relu2 squares it" if rounds(x.dtype, activation) else None


def rounds(dtype: torch.dtype, activation: str | None) -> bool:
    """Whether the rounding before `activation` would be seen in the result."""
    return activation == "relu2" and dtype in (torch.bfloat16, torch.float16)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, pre), with the product rounded to x.dtype before the activation and the residual."""
    y = F.linear(x, weight, bias)
    pre = x.new_empty(0) if activation is None else y
    if activation is not None or residual is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        z = reference.activate(y.to(wide), activation)
        y = (z if residual is None else z + residual).to(x.dtype)
    return (y.contiguous() if out is None else out.copy_(y)), pre


def backward(*args: Any, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias), without elements where not needed; `out`, where given, is dx."""
    (dx, _, dbias), weights = backward_in_parts(*args, out=out)
    return dx, made(weights()[1]), dbias


def backward_in_parts(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    *,
    out: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], Callable[[], tuple[torch.Tensor | Product, ...]]]:
    """(dx, nothing, dbias), and what gives (nothing, dweight, nothing)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dz = dy if activation is None else (dy * reference.slope(pre.to(wide), activation)).to(x.dtype)
    dz_rows, x_rows = rows(dz), rows(x)
    nothing = x.new_empty(0)
    dx = torch.matmul(dz, weight).contiguous() if needs_dx else nothing
    dbias = dz_rows.sum(0, dtype=wide).to(x.dtype) if needs_dbias else nothing
    if out is not None and needs_dx:
        dx = out.copy_(dx)
    dweight = Product(torch_matmul, dz_rows.t(), x_rows) if needs_dweight else nothing
    return (dx, nothing, dbias), lambda: (nothing, dweight, nothing)
