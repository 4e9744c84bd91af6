"""AdamW with 8-bit block-wise states in plain PyTorch."""

from __future__ import annotations

import torch

from llmsys.ops.adamw import reference as adamw
from llmsys.ops.adamw_8bit.dynamic_map import decode, encode

Tensors = list[torch.Tensor]


@torch.no_grad()
def forward(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_scales: Tensors,
    exp_avg_sq_scales: Tensors,
    masters: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None,
    maximize: bool,
) -> None:
    """One step, in place: see `llmsys.ops.adamw_8bit`."""
    moments = list(zip(exp_avgs, exp_avg_scales, strict=True)), list(zip(exp_avg_sqs, exp_avg_sq_scales, strict=True))
    ms, vs = ([decode(*pair, signed=i == 0) for pair in pairs] for i, pairs in enumerate(moments))
    adamw.forward(params, grads, ms, vs, masters, lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize, None)
    for pairs, values, signed in ((moments[0], ms, True), (moments[1], vs, False)):
        for (codes, scales), value in zip(pairs, values, strict=True):
            new_codes, new_scales = encode(value, signed)
            codes.copy_(new_codes)
            scales.copy_(new_scales)
