"""AdamW on native kernels."""

from __future__ import annotations

import torch

from llmsys.ops import _native
from llmsys.ops._native import DTYPES, Kernels, same_layout
from llmsys.ops._op import Impl

Tensors = list[torch.Tensor]


def implementation(kernels: Kernels) -> Impl:
    """AdamW on `kernels`."""
    launch = kernels.launch("adamw")

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
    ) -> None:
        lists, copies = _flat([params, grads, exp_avgs, exp_avg_sqs, masters])
        launch(
            *([tensor.data_ptr() for tensor in tensors] for tensors in lists),
            *([param.numel() for param in params], lr, beta1, beta2, eps, weight_decay),
            *(1 - beta1**step, 1 - beta2**step, 0 if grad_scale is None else grad_scale.data_ptr(), maximize),
            *(DTYPES[params[0].dtype], DTYPES[grads[0].dtype]),
        )
        for tensor, copy in copies:
            tensor.copy_(copy)

    def why_not(params: Tensors, *args: object) -> str | None:
        return kernels.why_not(params[0])

    return Impl(kernels.name, torch.no_grad()(forward), None, why_not, (kernels.device,))


def _flat(lists: list[Tensors]) -> tuple[list[Tensors], list[tuple[torch.Tensor, torch.Tensor]]]:
    """The lists with their i-th tensors laid out alike and without gaps, and (tensor, copy) for each written one that
    was not."""
    if all(tensor.is_contiguous() for tensors in lists for tensor in tensors):
        return lists, []
    lists, copies = [list(tensors) for tensors in lists], []
    used = [tensors for tensors in lists if tensors]
    for i, together in enumerate(zip(*used, strict=True)):
        if same_layout(together):
            continue
        for tensors, tensor in zip(used, together, strict=True):
            if not tensor.is_contiguous():
                tensors[i] = tensor.contiguous()
                if tensors is not lists[1]:  # grads are only read
                    copies.append((tensor, tensors[i]))
    return lists, copies


CPU = implementation(_native.CPU)
CUDA = implementation(_native.CUDA)
