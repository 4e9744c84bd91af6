"""AdamW over 33 million parameters, in the tensors of a small Llama, against PyTorch, DeepSpeed and Apex.

"ready step" is the op itself; "public step" an optimizer's `step()`. "clip+step+copy" is a whole mixed-precision
update: float32 gradients unscaled and clipped to norm 1, float32 masters stepped, bfloat16 weights written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import llmsys
from benchmarks import peers
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import copied, same_bits, tensors
from benchmarks.harness import cannot_time
from llmsys.ops import _verify
from llmsys.ops.adamw import OP, cases

BLOCK = [(512, 512)] * 4 + [(1536, 512)] * 2 + [(512, 1536)] + [(512,)] * 2
SHAPES = [(32000, 512), *BLOCK * 5, (512,)]
NUMEL = (sum(torch.Size(shape).numel() for shape in SHAPES),)
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0


def arguments(dtype: torch.dtype, device: str) -> tuple:
    """Forward arguments of the op at its third step; float32 masters where the parameters are narrower."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> list[torch.Tensor]:
        return [(torch.randn(shape, generator=generator) * scale).to(device) for shape in SHAPES]

    masters, grads, exp_avgs = normal(0.02), normal(0.01), normal(0.001)
    exp_avg_sqs = [exp_avg.square() for exp_avg in normal(0.01)]
    params = [master.to(dtype, copy=True) for master in masters]
    masters = masters if dtype != torch.float32 else []
    (beta1, beta2), lr, eps, decay = (OPTIONS[name] for name in ("betas", "lr", "eps", "weight_decay"))
    return params, grads, exp_avgs, exp_avg_sqs, masters, lr, beta1, beta2, eps, decay, 3, None, False


def contests(case: Case, device: str) -> list[Contest]:
    args = arguments(getattr(torch, case.dtype), device)
    contest = Contest("adamw", case, bytes=cases.traffic("forward", *args), flops=cases.flops("forward", *args))
    {
        ("ready", "step"): enter_implementations,
        ("public", "step"): enter_optimizers,
        ("public", "clip+step+copy"): enter_updates,
    }[case.mode, case.direction](contest, args, device)
    return [contest]


def enter_implementations(contest: Contest, args: tuple, device: str) -> None:
    """The op by name, in place on one set of buffers: at 500 MB a set, caches are cold every time."""
    for name, implementation in OP.implementations.items():
        reason = cannot_time(name) or implementation.reason(device, args)
        if reason:
            contest.implementations[name] = reason
        else:
            contest.enter(name, partial(on_sets, partial(implementation.forward, *args)), fault_of_step(name, args))


def enter_optimizers(contest: Contest, args: tuple, device: str) -> None:
    chosen = str(OP.explain(*args).chosen)
    ours = llmsys.optim.AdamW(with_grads(args), **OPTIONS)
    contest.enter(chosen, partial(on_sets, ours.step), fault_of_step(chosen, args) or fault_of_optimizer(args))
    for peer in peers.ADAMW:
        reason = peer.why_not(device)
        contest.peers[peer.name] = reason or partial(on_sets, peer.build()(with_grads(args), **OPTIONS).step)


def enter_updates(contest: Contest, args: tuple, device: str) -> None:
    """The loss scale is 1, so that gradients that are unscaled in place stay what they were, round after round."""
    chosen = str(OP.explain(*args).chosen)
    params, grads, *_, masters = args[:5]
    unscale = torch.ones((), device=device)
    contest.enter(chosen, partial(on_sets, partial(clipped_step, args, unscale)), fault_of_step(chosen, args))
    leaves = with_grads((masters, copied(grads)))
    step = torch.optim.AdamW(leaves, fused=True, **OPTIONS).step

    def torch_update() -> None:
        torch._foreach_mul_([leaf.grad for leaf in leaves], unscale)
        torch.nn.utils.clip_grad_norm_(leaves, MAX_NORM)
        step()
        torch._foreach_copy_(params, [leaf.detach() for leaf in leaves])

    contest.peers["torch clip + fused + copy"] = partial(on_sets, torch_update)


def clipped_step(args: tuple, unscale: torch.Tensor) -> None:
    """The norm of the gradients, then everything else in one pass over memory."""
    norm = torch.nn.utils.get_total_norm(args[1]) * unscale
    grad_scale = unscale * (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    OP(*args[:11], grad_scale, *args[12:])


def with_grads(args: tuple) -> list[torch.Tensor]:
    """Leaves over the memory of the parameters, each with its gradient."""
    leaves = [param.detach().requires_grad_() for param in args[0]]
    for leaf, grad in zip(leaves, args[1], strict=True):
        leaf.grad = grad
    return leaves


def fault_of_step(implementation: str, args: tuple) -> str | None:
    """None when a step on a copy of `args` is right by the rule of the tests, else the first fault."""
    if implementation == "reference":
        return None
    wide = tuple([t.double() for t in arg] if isinstance(arg, list) else arg for arg in args)
    runs = {"ours": (implementation, copied(args)), "same": ("reference", copied(args)), "true": ("reference", wide)}
    for name, given in runs.values():
        OP.implementations[name].forward(*given)
    triples = zip(*(tensors(given) for _, given in runs.values()), strict=True)
    for index, triple in enumerate(triples):
        verdict = _verify._judge(f"tensor {index}", [triple])
        if not verdict.right:
            return str(verdict)
    return None


def fault_of_optimizer(args: tuple) -> str | None:
    """None when the optimizer's first step is the op's first step, bit by bit."""
    zeros = [[torch.zeros_like(t) for t in args[0]] for _ in range(2)]
    expected = (copied(args[0]), args[1], *zeros, [], *args[5:10], 1, *args[11:])
    OP(*expected)
    leaves = with_grads((copied(args[0]), args[1]))
    llmsys.optim.AdamW(leaves, **OPTIONS).step()
    return None if same_bits([leaf.detach() for leaf in leaves], expected[0]) else "step() gives other bits than the op"


def on_sets(call: Callable[[], Any], index: int) -> Any:
    """`call`, whatever the set: there is one."""
    return call()


BENCH = Bench(
    op="adamw",
    plan=[
        Case("ready", "step", NUMEL, "float32"),
        Case("public", "step", NUMEL, "float32"),
        Case("public", "clip+step+copy", NUMEL, "bfloat16"),
    ],
    contests=contests,
    names=[*OP.implementations, *(peer.name for peer in peers.ADAMW), "torch clip + fused + copy"],
)


def test_adamw(benchmark, contestant):
    benchmark(contestant)
