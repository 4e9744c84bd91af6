"""Stochastic gradient descent with momentum: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, ListOp, triton
from llmsys.ops.sgd import native, reference

OP = ListOp(
    "sgd",
    forward="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] masters, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, SymInt step, Tensor? grad_scale=None, "
    "bool maximize=False, SymInt? stochastic_rounding=None) -> ()",
    backward=None,
    implementations=[
        native.CPU,
        triton("llmsys.ops.sgd.triton_kernels"),
        Impl("reference", reference.forward),
    ],
)


@torch.no_grad()
def sgd(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: int = 1,
    grad_scale: torch.Tensor | None = None,
    maximize: bool = False,
    stochastic_rounding: int | None = None,
) -> None:
    """Take one step of gradient descent, in place, over lists of tensors, in one pass over memory.

        g = grad · grad_scale + weight_decay · p           (−grad to maximize)
        b = momentum · b + (1 − dampening) · g             (at step 1: + g)
        p = p − lr · b                                     (Nesterov: lr · (g + momentum · b); without buffers: lr · g)

    Shapes     the i-th tensors of all lists have one shape, any strides; grad_scale () float32
    Dtypes     one dtype per list: params and grads float16/bfloat16/float32, or both float64; momentum_buffers (b) and
               masters float32 (float64 with float64 params). With masters, p is the master and the param is written as
               its rounding; without, p is the param itself
    Numerics   in float32 (float64 for float64); params rounded once; the same bits whatever the number of threads
    Rounding   to nearest, or with stochastic_rounding, a seed, of bfloat16 params without masters, up or down at random
               so that the mean is p: the upper half of word i of Philox-4x32-10, as `dropout` numbers them, for element
               i of the list, each tensor's beginning at a multiple of 64. Another seed for every call
    Gradient   none
    Cost       per element: param and grad in, param out, 8 bytes of b, 8 of a master: bandwidth-bound
    Errors     ValueError if lists, shapes or devices differ, step < 1, there is momentum without buffers or the
               other way round, or masters with stochastic_rounding; TypeError for dtypes not named above
    Source     Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13, in the form torch.optim.SGD computes it
    """
    named = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers, "masters": masters}
    lists = {name: list(tensors) for name, tensors in named.items()}
    if not any(lists.values()):
        return
    _check.lists("sgd", lists, _check.optimizer_dtypes(lists), optional=("momentum_buffers", "masters"))
    if step < 1:
        raise ValueError(f"llmsys.sgd: step is {step}, expected a count from 1")
    if (momentum != 0) != bool(lists["momentum_buffers"]):
        raise ValueError(
            f"llmsys.sgd: momentum is {momentum} with {len(lists['momentum_buffers'])} momentum_buffers, "
            "expected one for each param with momentum, none without"
        )
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(
            f"llmsys.sgd: nesterov with momentum {momentum} and dampening {dampening}, "
            "expected momentum > 0 and no dampening"
        )
    if grad_scale is not None:
        _check.grad_scale("sgd", grad_scale, lists["params"][0])
    seed = _check.stochastic_rounding("sgd", stochastic_rounding, lists)
    OP(*lists.values(), lr, momentum, dampening, weight_decay, nesterov, step, grad_scale, maximize, seed)
