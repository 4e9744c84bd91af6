"""GroupNorm in plain PyTorch."""

from __future__ import annotations

import torch


def forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd): see `llmsys.group_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, xhat, rstd = _normalised(x.to(wide), num_groups, eps)
    xhat = xhat.reshape(*x.shape[:2], x.shape[2:].numel())
    y = xhat if weight is None else xhat * weight.to(wide)[:, None]
    y = y if bias is None else y + bias.to(wide)[:, None]
    y = y.to(x.dtype).reshape(x.shape).contiguous()
    return (y if out is None else out.copy_(y)), mean.flatten(1), rstd.flatten(1)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias). `mean` and `rstd` are computed anew, so that this function can itself be differentiated."""
    wide = torch.promote_types(x.dtype, torch.float32)
    _, xhat, rstd = _normalised(x.to(wide), num_groups, eps)
    g = dy.to(wide).reshape(*x.shape[:2], x.shape[2:].numel())
    weighted = (g if weight is None else g * weight.to(wide)[:, None]).reshape(xhat.shape)
    along = (weighted * xhat).mean(-1, keepdim=True)
    dx = (weighted - weighted.mean(-1, keepdim=True) - xhat * along) * rstd
    dx = dx.to(x.dtype).reshape(x.shape).contiguous()
    dweight = None if weight is None else (g * xhat.reshape(g.shape)).sum((0, 2)).to(weight.dtype)
    dbias = None if bias is None else g.sum((0, 2)).to(bias.dtype)
    return (dx if out is None else out.copy_(dx)), dweight, dbias


def _normalised(s: torch.Tensor, num_groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean, (s - mean) · rstd and rstd of each group: (N, G, elements of a group)."""
    s = s.reshape(s.shape[0], num_groups, s.shape[1:].numel() // num_groups)
    mean = s.mean(-1, keepdim=True)
    centred = s - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return mean, centred * rstd, rstd
