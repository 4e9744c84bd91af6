"""AdamW with 8-bit block-wise states on native kernels."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._flat import Tensors, flat
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """AdamW with 8-bit states on `kernels`."""
    launch = kernels.launch("adamw_8bit")

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
        # The codes are contiguous: laid out like them is in row-major order, as blocks are.
        with flat([params, exp_avgs, exp_avg_sqs, masters], [grads]) as (ps, ms, vs, ws, gs):
            lists = ps, gs, ms, vs, exp_avg_scales, exp_avg_sq_scales, ws
            launch(
                *([tensor.data_ptr() for tensor in tensors] for tensors in lists),
                *([param.numel() for param in params], lr, beta1, beta2, eps, weight_decay),
                *(1 - beta1**step, 1 - beta2**step, 0 if grad_scale is None else grad_scale.data_ptr(), maximize),
                *(DTYPES[params[0].dtype], DTYPES[grads[0].dtype]),
            )

    def why_not(params: Tensors, *args: object) -> str | None:
        return kernels.why_not(params[0])

    return Impl(kernels.name, torch.no_grad()(forward), None, why_not, (kernels.device,))


CPU = implementation(_native.CPU)
CUDA = implementation(_native.CUDA)
