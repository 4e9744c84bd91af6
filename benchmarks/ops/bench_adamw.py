"""AdamW over 33.6 million parameters against PyTorch, DeepSpeed and Apex.

"ready step" is the op itself, "public step" an optimizer's `step()`. "public clip+step+copy" is a whole mixed-precision
update: bfloat16 gradients unscaled and clipped to norm 1, float32 masters stepped, bfloat16 weights written.
"""

from collections.abc import Callable
from functools import partial

import torch

import llmsys.optim
from benchmarks import peers
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import copied, fault_of, tensors
from benchmarks.harness import cannot_time
from llmsys.ops.adamw import OP, cases

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
TORCH_UPDATE = "torch clip, fused, copy"
PARAMETERS = (1 << 22, 1 << 11) * 8  # 33.6 million in 16 tensors
BARS = (
    Bar("adamw", Case("public", "step", PARAMETERS, "float32"), "times", 1, "torch fused"),
    Bar("adamw", Case("public", "clip+step+copy", PARAMETERS), "times", 1.5, TORCH_UPDATE),
)


def contests(case: Case, device: str) -> list[Contest]:
    """One contest on one set of buffers: at half a gigabyte, caches are cold every time."""
    mixed = case.direction == "clip+step+copy"
    args = cases.inputs(case.shape, getattr(torch, case.dtype), device, masters=mixed)
    contest = Contest("adamw", case, bytes=cases.traffic("forward", *args), flops=cases.flops("forward", *args))
    gate = partial(fault_of, OP, cases, shape=case.shape, dtype=case.dtype, device=device, masters=mixed)
    if case.mode == "ready":
        enter_implementations(contest, args, gate, device)
        return [contest]
    params = leaves(args[0], args[1])
    ours = llmsys.optim.AdamW(params, **OPTIONS)
    chosen = str(OP.explain(*args).chosen)
    if mixed:
        contest.bytes += sum(grad.nbytes for grad in args[1])  # the norm reads them first
        contest.enter(chosen, without_sets(partial(fused_update, params, ours)), gate(chosen))
        contest.peers[TORCH_UPDATE] = without_sets(torch_update(args))
        return [contest]
    contest.enter(chosen, without_sets(ours.step), gate(chosen))
    for peer in peers.ADAMW:
        reason = peer.why_not(device)
        contest.peers[peer.name] = reason or without_sets(peer.build()(leaves(args[0], args[1]), **OPTIONS).step)
    return [contest]


def enter_implementations(contest: Contest, args: tuple, gate: Callable, device: str) -> None:
    for name, implementation in OP.implementations.items():
        reason = cannot_time(name) or implementation.reason(device, args)
        if reason:
            contest.implementations[name] = reason
        else:
            contest.enter(name, without_sets(partial(implementation.forward, *args)), gate(name))


def fused_update(params: list[torch.Tensor], optimizer: llmsys.optim.AdamW, unscale: float = 1.0) -> None:
    """The norm of the gradients, then all the rest in one pass over memory."""
    _, grad_scale = llmsys.optim.clip_grad_norm(params, MAX_NORM / unscale)
    optimizer.step(grad_scale=grad_scale * unscale)


def torch_update(args: tuple, unscale: float = 1.0) -> Callable[[], None]:
    """The same in PyTorch's steps. Unscaling by 1 keeps the gradients, which it writes in place, from fading away."""
    params = leaves(copied(args[0]), copied(args[1]))
    masters = leaves(args[4], [torch.empty_like(master) for master in args[4]])
    step = torch.optim.AdamW(masters, fused=True, **OPTIONS).step
    grads, weights = [param.grad for param in params], [param.detach() for param in params]
    wide_grads, wide_weights = [master.grad for master in masters], [master.detach() for master in masters]

    def update() -> None:
        torch._foreach_mul_(grads, unscale)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        torch._foreach_copy_(wide_grads, grads)
        step()
        torch._foreach_copy_(weights, wide_weights)

    return update


def leaves(weights: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parameters over the memory of `weights`, each with its gradient."""
    params = [weight.detach().requires_grad_() for weight in weights]
    for param, grad in zip(params, tensors(grads), strict=True):
        param.grad = grad
    return params


def without_sets(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda index: call()


BENCH = Bench(
    op="adamw",
    plan=[
        *(Case(mode, "step", shape, "float32") for shape in cases.LARGE for mode in ("ready", "public")),
        *(Case("public", "clip+step+copy", shape) for shape in cases.LARGE),
    ],
    contests=contests,
    names=[*OP.implementations, *(peer.name for peer in peers.ADAMW), TORCH_UPDATE],
    bars=BARS,
)


def test_adamw(benchmark, contestant):
    benchmark(contestant)
