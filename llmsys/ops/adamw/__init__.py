"""AdamW: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, ListOp, triton
from llmsys.ops.adamw import native, reference

OP = ListOp(
    "adamw",
    forward="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, float lr, float beta1, float beta2, float eps, float weight_decay, SymInt step, "
    "Tensor? grad_scale=None, bool maximize=False, SymInt? stochastic_rounding=None) -> ()",
    backward=None,
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.adamw.triton_kernels"),
        Impl("reference", reference.forward),
    ],
)


@torch.no_grad()
def adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor] = (),
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None = None,
    maximize: bool = False,
    stochastic_rounding: int | None = None,
) -> None:
    """Take one AdamW step, in place, over lists of tensors, in one pass over memory.

        g = grad · grad_scale                              (−g to maximize)
        p = p · (1 − lr · weight_decay)
        m = m + (g − m) · (1 − beta1);  v = v · beta2 + (1 − beta2) · g²
        p = p − lr / (1 − beta1^step) · m / (√v / √(1 − beta2^step) + eps)

    Shapes     the i-th tensors of all lists have one shape, any strides; grad_scale () float32
    Dtypes     one dtype per list: params and grads float16/bfloat16/float32, or both float64; exp_avgs (m), exp_avg_sqs
               (v) and masters float32 (float64 with float64 params). With masters, p is the master and the param is
               written as its rounding; without, p is the param itself
    Numerics   in float32 (float64 for float64), division and square root exact; params rounded once; the same bits
               whatever the number of threads
    Rounding   to nearest, or with stochastic_rounding, a seed, of bfloat16 params without masters, up or down at random
               so that the mean is p: the upper half of word i of Philox-4x32-10, as `dropout` numbers them, for element
               i of the list, each tensor's beginning at a multiple of 64. Another seed for every call
    Gradient   none
    Cost       per element: param and grad in, param out, 16 bytes of m and v, 8 of a master: bandwidth-bound
    Errors     ValueError if lists, shapes or devices differ, step < 1, a beta is outside [0, 1), or masters
               come with stochastic_rounding; TypeError for dtypes not named above
    Source     Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2
    """
    named = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    lists = {name: list(tensors) for name, tensors in named.items()}
    if not any(lists.values()):
        return
    _check.lists("adamw", lists, _check.optimizer_dtypes(lists), optional=("masters",))
    _check.betas("adamw", beta1=beta1, beta2=beta2)
    if step < 1:
        raise ValueError(f"llmsys.adamw: step is {step}, expected a count from 1")
    if grad_scale is not None:
        _check.grad_scale("adamw", grad_scale, lists["params"][0])
    seed = _check.stochastic_rounding("adamw", stochastic_rounding, lists)
    OP(*lists.values(), lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize, seed)
