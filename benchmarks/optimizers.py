"""Time a step of an optimizer: "ready" is the op itself, "public" an optimizer's `step()` beside other people's."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import fault_of, tensors
from benchmarks.harness import cannot_time
from benchmarks.peers import Peer
from llmsys.ops._op import ListOp


def bench_optimizer(
    op: ListOp, cases: ModuleType, optimizer: Callable, options: dict[str, Any], peers: Sequence[Peer] = ()
) -> Bench:
    """The benchmark of `op`: the large lists in float32. `optimizer` is ours on it; peers build optimizers too."""
    return Bench(
        op=op.name,
        plan=[Case(mode, "step", shape, "float32") for shape in cases.LARGE for mode in ("ready", "public")],
        contests=lambda case, device: [step_contest(op, cases, optimizer, options, peers, case, device)],
        names=[*op.implementations, *(peer.name for peer in peers)],
    )


def step_contest(
    op: ListOp,
    cases: ModuleType,
    optimizer: Callable,
    options: dict[str, Any],
    peers: Sequence[Peer],
    case: Case,
    device: str,
) -> Contest:
    """One contest on one set of buffers: at half a gigabyte, caches are cold every time."""
    args = cases.inputs(case.shape, getattr(torch, case.dtype), device)
    contest = Contest(op.name, case, bytes=cases.traffic("forward", *args), flops=cases.flops("forward", *args))
    gate = partial(fault_of, op, cases, shape=case.shape, dtype=case.dtype, device=device)
    if case.mode == "ready":
        for name, implementation in op.implementations.items():
            reason = cannot_time(name) or implementation.reason(device, args)
            if reason:
                contest.implementations[name] = reason
            else:
                contest.enter(name, without_sets(partial(implementation.forward, *args)), gate(name))
        return contest
    chosen = str(op.explain(*args).chosen)
    contest.enter(chosen, without_sets(optimizer(leaves(args[0], args[1]), **options).step), gate(chosen))
    for peer in peers:
        reason = peer.why_not(device)
        contest.peers[peer.name] = reason or without_sets(peer.build()(leaves(args[0], args[1]), **options).step)
    return contest


def leaves(weights: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parameters over the memory of `weights`, each with its gradient."""
    params = [weight.detach().requires_grad_() for weight in weights]
    for param, grad in zip(params, tensors(grads), strict=True):
        param.grad = grad
    return params


def without_sets(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda index: call()
