"""Linear in plain PyTorch."""

from __future__ import annotations

import math

import torch

Wide = torch.Tensor  # in float32, or float64


def activate(z: Wide, activation: str | None) -> Wide:
    if activation == "relu":
        return torch.relu(z)
    if activation == "relu2":
        return torch.relu(z).square()
    if activation == "silu":
        return z * torch.sigmoid(z)
    if activation == "gelu":
        return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z


def slope(z: Wide, activation: str | None) -> Wide:
    """The derivative of `activate` at z."""
    if activation == "relu":
        return torch.where(z <= 0, 0.0, 1.0).to(z.dtype)
    if activation == "relu2":
        return 2 * torch.relu(z)
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid + z * sigmoid * (1 - sigmoid)
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density
    if activation == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        tanh = torch.tanh(scale * (z + 0.044715 * z**3))
        return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * z * z)
    return torch.ones_like(z)


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
    rows = dz.reshape(-1, weight.shape[0])
    nothing = x.new_empty(0)
    dx = torch.matmul(dz, weight.to(wide)).to(x.dtype).contiguous() if needs_dx else nothing
    dweight = (rows.t() @ x.to(wide).reshape(-1, x.shape[-1])).to(x.dtype).contiguous() if needs_dweight else nothing
    dbias = rows.sum(0).to(x.dtype) if needs_dbias else nothing
    return (dx if out is None or not needs_dx else out.copy_(dx)), dweight, dbias
