"""Muon: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, ListOp
from llmsys.ops.muon import reference
from llmsys.ops.muon.reference import ADJUSTMENTS

OP = ListOp(
    "muon",
    forward="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] masters, float lr, "
    "str adjust_lr_fn, float momentum, float weight_decay, bool nesterov, float a, float b, float c, float eps, "
    "int ns_steps, Tensor? grad_scale=None, bool maximize=False, SymInt? stochastic_rounding=None) -> ()",
    backward=None,
    implementations=[Impl("reference", reference.forward)],
)


@torch.no_grad()
def muon(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor] = (),
    *,
    lr: float,
    adjust_lr_fn: str = "original",
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    grad_scale: torch.Tensor | None = None,
    maximize: bool = False,
    stochastic_rounding: int | None = None,
) -> None:
    """Take one Muon step, in place, over lists of matrices: momentum, made nearly orthogonal by a quintic iteration.

        g = grad · grad_scale                              (−g to maximize)
        b = b + (g − b) · (1 − momentum)
        x = b / max(‖b‖, eps)                              (Nesterov: of g + (b − g) · momentum)
        x = a · x + (b · s + c · s²) · x,  s = x xᵀ        ns_steps times, with (a, b, c) = ns_coefficients
        p = p · (1 − lr · weight_decay) − lr · adjustment · x

    adjustment is max(1, √(rows / columns)), or 0.2 · √max(rows, columns) for adjust_lr_fn="match_rms_adamw", so that
    the learning rate of AdamW fits. Singular values of b / ‖b‖ above 0.01 come out between 0.68 and 1.14.

    Shapes     the i-th tensors of all lists are one matrix, any strides; grad_scale () float32
    Dtypes     one dtype per list: params and grads float16/bfloat16/float32, or both float64; momentum_buffers (b) and
               masters float32 (float64 with float64 params). With masters, p is the master and the param is written as
               its rounding; without, p is the param itself
    Numerics   the iteration in bfloat16, as its author has it (float64 for float64), the rest in float32; params
               rounded once; matrix products are PyTorch's
    Rounding   to nearest, or with stochastic_rounding, a seed, of bfloat16 params without masters, up or down at
               random: see `llmsys.ops.adamw`
    Gradient   none
    Cost       ns_steps · (4·R²·C + 2·R³) flop for R × C, R <= C: bound by arithmetic
    Errors     ValueError if lists, shapes or devices differ, a tensor is no matrix, adjust_lr_fn is another name, or
               masters come with stochastic_rounding; TypeError for dtypes not named above
    Source     Jordan et al. 2024, kellerjordan.github.io/posts/muon; match_rms_adamw: Liu et al. 2025,
               arXiv:2502.16982, eq. 4; in the form torch.optim.Muon computes it
    """
    named = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers, "masters": masters}
    lists = {name: list(tensors) for name, tensors in named.items()}
    if not any(lists.values()):
        return
    _check.lists("muon", lists, _check.optimizer_dtypes(lists), optional=("masters",))
    for i, param in enumerate(lists["params"]):
        if param.dim() != 2:
            raise ValueError(f"llmsys.muon: params[{i}] has shape {tuple(param.shape)}, expected a matrix")
    if adjust_lr_fn not in ADJUSTMENTS:
        raise ValueError(f"llmsys.muon: adjust_lr_fn is {adjust_lr_fn!r}, expected one of {', '.join(ADJUSTMENTS)}")
    if grad_scale is not None:
        _check.grad_scale("muon", grad_scale, lists["params"][0])
    seed = _check.stochastic_rounding("muon", stochastic_rounding, lists)
    settings = lr, adjust_lr_fn, momentum, weight_decay, nesterov, *ns_coefficients, eps, ns_steps
    OP(*lists.values(), *settings, grad_scale, maximize, seed)
