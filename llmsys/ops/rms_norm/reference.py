"""RMSNorm in plain PyTorch."""

import torch


def forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd): see `llmsys.rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = _rstd(x.to(wide), eps)
    y = (x.to(wide) * rstd * (weight.to(wide) + weight_offset)).to(x.dtype).contiguous()
    return (y if out is None else out.copy_(y)), rstd.flatten()


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight). `rstd` is computed anew, so that this function can itself be differentiated."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s, g = x.to(wide), dy.to(wide)
    rstd = _rstd(s, eps)
    weighted = g * (weight.to(wide) + weight_offset)
    dx = rstd * (weighted - s * rstd.square() * (weighted * s).mean(-1, keepdim=True))
    dweight = (g * s * rstd).reshape(-1, s.shape[-1]).sum(0)
    dx = dx.to(x.dtype).contiguous()
    return (dx if out is None else out.copy_(dx)), dweight.to(weight.dtype)


def _rstd(s: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
