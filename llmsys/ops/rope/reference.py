"""Rotary position embedding in plain PyTorch."""

import torch


def forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y: see `llmsys.rope`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)  # the same for every head
    half = cos.shape[-1]
    rotating, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        a, b = rotating[..., 0::2], rotating[..., 1::2]
        rotated = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = rotating[..., :half], rotating[..., half:]
        rotated = torch.cat((a * c - b * s, b * c + a * s), -1)
    y = torch.cat((rotated.to(x.dtype), rest), -1).contiguous()
    return y if out is None else out.copy_(y)


def backward(
    dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """dx: rotated by the negative angle."""
    return forward(dy, cos, -sin, interleaved, out)
