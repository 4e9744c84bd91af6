"""LAMB: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, ListOp, triton
from llmsys.ops.lamb import native, reference

OP = ListOp(
    "lamb",
    forward="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, float lr, float beta1, float beta2, float eps, float weight_decay, SymInt step, "
    "Tensor? grad_scale=None, bool maximize=False, SymInt? stochastic_rounding=None) -> ()",
    backward=None,
    implementations=[
        native.CPU,
        triton("llmsys.ops.lamb.triton_kernels"),
        Impl("reference", reference.forward),
    ],
)


@torch.no_grad()
def lamb(
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
    """Take one LAMB step, in place, over lists of tensors: Adam's direction, scaled for each tensor to the length of
    its weights, so that large batches train with large steps.

        g = grad · grad_scale                              (−g to maximize)
        m = m + (g − m) · (1 − beta1);  v = v · beta2 + (1 − beta2) · g²
        u = m / (1 − beta1^step) / (√v / √(1 − beta2^step) + eps) + weight_decay · p
        p = p − lr · ‖p‖ / ‖u‖ · u                         (− lr · u where either length is 0)

    Shapes     the i-th tensors of all lists have one shape, any strides; grad_scale () float32
    Dtypes     one dtype per list: params and grads float16/bfloat16/float32, or both float64; exp_avgs (m), exp_avg_sqs
               (v) and masters float32 (float64 with float64 params). With masters, p is the master and the param is
               written as its rounding; without, p is the param itself
    Numerics   in float32 (float64 for float64), division and square root exact; squares summed in runs,
               the runs in float64; params rounded once; the same bits whatever the number of threads
    Rounding   to nearest, or with stochastic_rounding, a seed, of bfloat16 params without masters, up or down at random
               so that the mean is p: the upper half of word i of Philox-4x32-10, as `dropout` numbers them, for element
               i of the list, each tensor's beginning at a multiple of 64. Another seed for every call
    Gradient   none
    Cost       per element: param twice and grad in, param out, 24 bytes of m and v, 12 of a master: bandwidth-bound
    Errors     ValueError if lists, shapes or devices differ, step < 1, a beta is outside [0, 1), or masters
               come with stochastic_rounding; TypeError for dtypes not named above
    Source     You et al. 2019, arXiv:1904.00962, algorithm 2, with the identity for φ
    """
    named = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    lists = {name: list(tensors) for name, tensors in named.items()}
    if not any(lists.values()):
        return
    _check.lists("lamb", lists, _check.optimizer_dtypes(lists), optional=("masters",))
    _check.betas("lamb", beta1=beta1, beta2=beta2)
    if step < 1:
        raise ValueError(f"llmsys.lamb: step is {step}, expected a count from 1")
    if grad_scale is not None:
        _check.grad_scale("lamb", grad_scale, lists["params"][0])
    seed = _check.stochastic_rounding("lamb", stochastic_rounding, lists)
    OP(*lists.values(), lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize, seed)
