"""AdamW: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmsys.ops import _check
from llmsys.ops._op import Impl, ListOp, triton
from llmsys.ops.adamw import native, reference

NARROW = (torch.float32, torch.bfloat16, torch.float16)

OP = ListOp(
    "adamw",
    forward="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, float lr, float beta1, float beta2, float eps, float weight_decay, SymInt step, "
    "Tensor? grad_scale=None, bool maximize=False) -> ()",
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
    Gradient   none
    Cost       per element: param and grad in, param out, 16 bytes of m and v, 8 of a master: bandwidth-bound
    Errors     ValueError if lists, shapes or devices differ, or step < 1; TypeError for dtypes not named above
    Source     Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2
    """
    named = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    lists = {name: list(tensors) for name, tensors in named.items()}
    if not any(lists.values()):
        return
    _check_lists(lists)
    if step < 1:
        raise ValueError(f"llmsys.adamw: step is {step}, expected a count from 1")
    if grad_scale is not None:
        _check_grad_scale(grad_scale, lists["params"][0])
    OP(*lists.values(), lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize)


def _check_lists(lists: dict[str, list[torch.Tensor]]) -> None:
    lengths = {name: len(tensors) for name, tensors in lists.items() if tensors or name != "masters"}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"llmsys.adamw: {given}, expected lists of one length, or no masters")
    first = lists["params"][0]
    wide = (torch.float64,) if first.dtype == torch.float64 else (torch.float32,)
    narrow = wide if first.dtype == torch.float64 else NARROW
    allowed = {"params": _check.FLOATS, "grads": narrow}
    shapes = [param.shape for param in lists["params"]]
    for name, tensors in lists.items():
        dtype, dtypes = tensors[0].dtype if tensors else None, allowed.get(name, wide)
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in dtypes:
                expected = " or ".join(map(str, dtypes))
                raise TypeError(f"llmsys.adamw: {name}[{i}] is {tensor.dtype}, expected {expected}")
            if tensor.dtype != dtype:
                raise TypeError(
                    f"llmsys.adamw: {name}[{i}] is {tensor.dtype}, expected {dtype}, as {name}[0] is; "
                    "call once for each dtype, as llmsys.optim.AdamW does"
                )
            if tensor.shape != shapes[i] or tensor.device != first.device:
                raise ValueError(
                    f"llmsys.adamw: {name}[{i}] has shape {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {tuple(shapes[i])} on {first.device}"
                )


def _check_grad_scale(grad_scale: torch.Tensor, param: torch.Tensor) -> None:
    if not isinstance(grad_scale, torch.Tensor):
        raise TypeError(
            f"llmsys.adamw: grad_scale is a {type(grad_scale).__name__}, expected a tensor of shape (), torch.float32"
        )
    if grad_scale.dtype not in (torch.float32, torch.promote_types(param.dtype, torch.float32)):
        raise TypeError(f"llmsys.adamw: grad_scale is {grad_scale.dtype}, expected torch.float32")
    if grad_scale.ndim or grad_scale.device != param.device:
        raise ValueError(
            f"llmsys.adamw: grad_scale has shape {tuple(grad_scale.shape)} on {grad_scale.device}, "
            f"expected () on {param.device}, as params[0] is"
        )
