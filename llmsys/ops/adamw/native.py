"""AdamW on native kernels."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._flat import Tensors, flat
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels, op: str = "adamw", *, row_major: bool = False) -> Impl:
    """AdamW on `kernels`, or an op with the same arguments; `row_major` for one that adds elements up."""
    launch = kernels.launch(op)

    def forward(
        params: Tensors,
        grads: Tensors,
        exp_avgs: Tensors,
        exp_avg_sqs: Tensors,
        masters: Tensors,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: torch.Tensor | None,
        maximize: bool,
        stochastic_rounding: int | None,
    ) -> None:
        stochastic = stochastic_rounding is not None
        with flat([params, exp_avgs, exp_avg_sqs, masters], [grads], row_major=row_major or stochastic) as (
            ps,
            ms,
            vs,
            ws,
            gs,
        ):
            launch(
                *([tensor.data_ptr() for tensor in tensors] for tensors in (ps, gs, ms, vs, ws)),
                *([param.numel() for param in params], lr, beta1, beta2, eps, weight_decay),
                *(1 - beta1**step, 1 - beta2**step, 0 if grad_scale is None else grad_scale.data_ptr(), maximize),
                *(stochastic, stochastic_rounding or 0),
                *(DTYPES[params[0].dtype], DTYPES[grads[0].dtype]),
            )

    def why_not(params: Tensors, *args: object) -> str | None:
        if args and args[-1] is not None and not kernels.name.startswith("cpu"):
            return "no stochastic rounding in the CUDA kernel"
        return kernels.why_not(params[0])

    return Impl(kernels.name, torch.no_grad()(forward), None, why_not, (kernels.device,))


CPU = implementation(_native.CPU)
CUDA = implementation(_native.CUDA)
