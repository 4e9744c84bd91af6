"""Linear on PyTorch's own GEMM, for the devices and types where that is the faster one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmsys.ops.linear import reference


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
    """(dx, dweight, dbias), without elements where not needed; `out`, where given, is dx."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dz = dy if activation is None else (dy * reference.slope(pre.to(wide), activation)).to(x.dtype)
    dz_rows, x_rows = (torch.atleast_2d(tensor).flatten(0, -2) for tensor in (dz, x))
    nothing = x.new_empty(0)
    dx = torch.matmul(dz, weight).contiguous() if needs_dx else nothing
    dweight = (dz_rows.t() @ x_rows).contiguous() if needs_dweight else nothing
    dbias = dz_rows.sum(0, dtype=wide).to(x.dtype) if needs_dbias else nothing
    return (dx if out is None or not needs_dx else out.copy_(dx)), dweight, dbias
