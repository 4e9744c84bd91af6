"""AdamW with 8-bit block-wise states: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, ListOp, triton
from llmsys.ops.adamw_8bit import native, reference
from llmsys.ops.adamw_8bit.dynamic_map import BLOCK, num_blocks

OP = ListOp(
    "adamw_8bit",
    forward="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] masters, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, SymInt step, Tensor? grad_scale=None, bool maximize=False) -> ()",
    backward=None,
    implementations=[
        native.CUDA,
        native.CPU,
        triton("llmsys.ops.adamw_8bit.triton_kernels"),
        Impl("reference", reference.forward),
    ],
)


@torch.no_grad()
def adamw_8bit(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
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
) -> None:
    """Take one AdamW step, in place, over lists of tensors whose moments are kept in 8 bits.

        m, v = number(code) · scale                        (scale: one for each 256 elements in row-major order)
        p, m, v as in `adamw`
        scale = max(largest |m| of the block, 2⁻¹²⁶);  code = that of the number nearest to m / scale; v alike

    The numbers are 0, 1 and seven decades down from 1, each evenly divided, twice as finely as the one below; for m
    they are signed, without −1, for v they are not. Zero moments have the code 127 (m) and 0 (v).

    Shapes     the i-th tensors have one shape, params, grads and masters any strides; exp_avgs (m) and exp_avg_sqs (v)
               contiguous; exp_avg_scales and exp_avg_sq_scales (ceil(numel / 256),), contiguous; grad_scale () float32
    Dtypes     one dtype per list: params and grads float16/bfloat16/float32; exp_avgs and exp_avg_sqs uint8; scales and
               masters float32. With masters, p is the master and the param is written as its rounding
    Numerics   in float32, division and square root exact; params rounded once; p moves by the moments before they are
               rounded to codes. A code is the nearest one, or its neighbour where rounding in float32 breaks the tie.
               A block with a moment that is NaN or infinite becomes NaN, all of it. The same bits whatever the number
               of threads
    Gradient   none
    Cost       per element: param and grad in, param out, 4 bytes of m and v, 8 of a master, and 1/16 of scales
    Errors     ValueError if lists, shapes or devices differ, a state has gaps, step < 1, or a beta is outside [0, 1);
               TypeError for dtypes not named above
    Source     Dettmers et al. 2021, arXiv:2110.02861, sections 2 and 3; Loshchilov & Hutter 2019, arXiv:1711.05101
    """
    lists = {
        "params": list(params),
        "grads": list(grads),
        "exp_avgs": list(exp_avgs),
        "exp_avg_sqs": list(exp_avg_sqs),
        "exp_avg_scales": list(exp_avg_scales),
        "exp_avg_sq_scales": list(exp_avg_sq_scales),
        "masters": list(masters),
    }
    if not any(lists.values()):
        return
    _check_lists(lists)
    _check.betas("adamw_8bit", beta1=beta1, beta2=beta2)
    if step < 1:
        raise ValueError(f"llmsys.adamw_8bit: step is {step}, expected a count from 1")
    if grad_scale is not None:
        _check.grad_scale("adamw_8bit", grad_scale, lists["params"][0])
    OP(*lists.values(), lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize)


def _check_lists(lists: dict[str, list[torch.Tensor]]) -> None:
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    wide = (torch.float32,)
    codes = (torch.uint8,)
    _check.lists(
        "adamw_8bit",
        lists,
        {
            "params": narrow,
            "grads": narrow,
            "exp_avgs": codes,
            "exp_avg_sqs": codes,
            "exp_avg_scales": wide,
            "exp_avg_sq_scales": wide,
            "masters": wide,
        },
        optional=("masters",),
        shapes={name: lambda param: (num_blocks(param.numel()),) for name in ("exp_avg_scales", "exp_avg_sq_scales")},
    )
    for name in ("exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"):
        for i, tensor in enumerate(lists[name]):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"llmsys.adamw_8bit: {name}[{i}] has strides {tensor.stride()}, expected a contiguous tensor; "
                    f"its blocks are {BLOCK} elements in row-major order"
                )
