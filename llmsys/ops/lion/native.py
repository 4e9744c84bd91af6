"""Lion on native kernels."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._flat import Tensors, flat
from llmsys.ops._native import DTYPES, Kernels
from llmsys.ops._op import Impl


def implementation(kernels: Kernels) -> Impl:
    """Lion on `kernels`."""
    launch = kernels.launch("lion")

    def forward(
        params: Tensors,
        grads: Tensors,
        exp_avgs: Tensors,
        masters: Tensors,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        grad_scale: torch.Tensor | None,
        maximize: bool,
        stochastic_rounding: int | None,
    ) -> None:
        stochastic = stochastic_rounding is not None
        with flat([params, exp_avgs, masters], [grads], row_major=stochastic) as (ps, ms, ws, gs):
            launch(
                *([tensor.data_ptr() for tensor in tensors] for tensors in (ps, gs, ms, ws)),
                *([param.numel() for param in params], lr, beta1, beta2, weight_decay),
                *(0 if grad_scale is None else grad_scale.data_ptr(), maximize),
                *(stochastic, stochastic_rounding or 0),
                *(DTYPES[params[0].dtype], DTYPES[grads[0].dtype]),
            )

    def why_not(params: Tensors, *args: object) -> str | None:
        return kernels.why_not(params[0])

    return Impl(kernels.name, torch.no_grad()(forward), None, why_not, (kernels.device,))


CPU = implementation(_native.CPU)
