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
from benchmarks.gate import copied, fault_of
from benchmarks.optimizers import leaves, step_contest, without_sets
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
    if case.direction == "step":
        return [step_contest(OP, cases, llmsys.optim.AdamW, OPTIONS, peers.ADAMW, case, device)]
    args = cases.inputs(case.shape, getattr(torch, case.dtype), device, masters=True)
    contest = Contest("adamw", case, bytes=cases.traffic("forward", *args), flops=cases.flops("forward", *args))
    contest.bytes += sum(grad.nbytes for grad in args[1])  # the norm reads them first
    params = leaves(args[0], args[1])
    chosen = str(OP.explain(*args).chosen)
    fault = fault_of(OP, cases, chosen, case.shape, case.dtype, device, masters=True)
    contest.enter(chosen, without_sets(partial(fused_update, params, llmsys.optim.AdamW(params, **OPTIONS))), fault)
    contest.peers[TORCH_UPDATE] = without_sets(torch_update(args))
    return [contest]


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
