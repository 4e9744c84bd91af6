"""SwiGLU in plain PyTorch."""

import torch


def forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """y: see `llmsys.swiglu`."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide)
    y = (g * torch.sigmoid(g) * up.to(wide)).to(gate.dtype).contiguous()
    return y if out is None else out.copy_(y)


def backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, d = gate.to(wide), dy.to(wide)
    sigmoid = torch.sigmoid(g)
    dgate = d * up.to(wide) * (sigmoid + g * sigmoid * (1 - sigmoid))
    dup = d * g * sigmoid
    dgate, dup = dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()
    return (dgate, dup) if out is None else (out[0].copy_(dgate), out[1].copy_(dup))
