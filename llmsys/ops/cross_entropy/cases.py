"""Cross entropy: inputs, sizes, cost."""

from __future__ import annotations

import torch

from llmsys.ops._cases import random

SMALL = (
    (0, 8),
    (1, 1),
    (3, 7),
    (2, 3, 15),
    (5, 16),
    (4, 17),
    (7, 31),
    (9, 32),
    (2, 2, 33),
    (3, 129),
    (2, 1030),
    (2, 2100),
)
LARGE = ((4096, 32000), (1024, 128256))
EDGES = ((4096, 50257), (4, 262144), (64, 512))
VARIANTS: tuple[dict, ...] = (
    {},
    {"scale": 20.0},
    {"weighted": True},
    {"label_smoothing": 0.1},
    {"weighted": True, "label_smoothing": 0.2, "z_loss": 1e-2},
    {"softcap": 5.0, "scale": 4.0},
    {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-2},
)
IGNORED = -100


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    scale: float = 1.0,
    weighted: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple:
    """Forward arguments in schema order: logits of `shape` times `scale`, targets of which every fifth is ignored."""
    classes = shape[-1]
    logits, weight = random(seed, device, (shape, dtype), ((classes,), torch.float32))
    target = classes_of(seed, device, shape[:-1], classes)
    return logits * scale, target, weight.abs() if weighted else None, IGNORED, label_smoothing, z_loss, softcap


def classes_of(seed: int, device: str, shape: tuple[int, ...], classes: int) -> torch.Tensor:
    """Targets of `shape`, of which every fifth is ignored."""
    if device == "meta":
        return torch.empty(shape, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (torch.Size(shape).numel(),), generator=generator)
    target[4::5] = IGNORED
    return target.view(shape).to(device)


def traffic(direction: str, logits: torch.Tensor, *_: object) -> int:
    """Bytes that must move: logits in; backward, logits in and dlogits out. What a row has one of is not counted."""
    return {"forward": 1, "backward": 2}[direction] * logits.numel() * logits.element_size()


def flops(direction: str, logits: torch.Tensor, *_: object) -> int:
    """An exponential (counted as four), a difference and a sum or product an element."""
    return 6 * logits.numel()
