"""LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd): see `llmsys.layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, xhat, rstd = _normalised(x.to(wide), eps)
    y = xhat if weight is None else xhat * weight.to(wide)
    y = (y if bias is None else y + bias.to(wide)).to(x.dtype).contiguous()
    return (y if out is None else out.copy_(y)), mean.flatten(), rstd.flatten()


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias). `mean` and `rstd` are computed anew, so that this function can itself be differentiated."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g = dy.to(wide)
    _, xhat, rstd = _normalised(x.to(wide), eps)
    weighted = g if weight is None else g * weight.to(wide)
    along = (weighted * xhat).mean(-1, keepdim=True)
    dx = (weighted - weighted.mean(-1, keepdim=True) - xhat * along) * rstd
    dx = dx.to(x.dtype).contiguous()
    dweight = None if weight is None else _over_rows(g * xhat).to(weight.dtype)
    dbias = None if bias is None else _over_rows(g).to(bias.dtype)
    return (dx if out is None else out.copy_(dx)), dweight, dbias


def _normalised(s: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = s.mean(-1, keepdim=True)
    centred = s - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return mean, centred * rstd, rstd


def _over_rows(terms: torch.Tensor) -> torch.Tensor:
    return terms.reshape(-1, terms.shape[-1]).sum(0)
