"""The norm of 33.6 million gradients, against PyTorch's."""

from functools import partial

import torch

import llmsys
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import fault_of
from benchmarks.harness import cannot_time
from benchmarks.optimizers import without_sets
from benchmarks.peers import Peer
from llmsys.ops.grad_norm import OP, cases

PARAMETERS = cases.LARGE[-1]
PEERS = (Peer("torch", lambda: torch.nn.utils.get_total_norm),)
BARS = (Bar("grad_norm", Case("public", "forward", PARAMETERS), "times", 1.3, "torch"),)


def contest(case: Case, device: str) -> Contest:
    """On one set of buffers: caches are cold every time."""
    (grads,) = args = cases.inputs(case.shape, getattr(torch, case.dtype), device)
    entered = Contest("grad_norm", case, bytes=cases.traffic("forward", *args), flops=cases.flops("forward", *args))
    gate = partial(fault_of, OP, cases, shape=case.shape, dtype=case.dtype, device=device)
    if case.mode == "ready":
        for name, implementation in OP.implementations.items():
            reason = cannot_time(name) or implementation.reason(device, args)
            if reason:
                entered.implementations[name] = reason
            else:
                entered.enter(name, without_sets(partial(implementation.forward, grads)), gate(name))
        return entered
    chosen = str(OP.explain(*args).chosen)
    entered.enter(chosen, without_sets(partial(llmsys.grad_norm, grads)), gate(chosen))
    for peer in PEERS:
        entered.peers[peer.name] = peer.why_not(device) or without_sets(partial(peer.build(), grads))
    return entered


BENCH = Bench(
    op="grad_norm",
    plan=[
        Case(mode, "forward", shape, dtype)
        for shape in cases.LARGE
        for dtype in ("float32", "bfloat16")
        for mode in ("ready", "public")
    ],
    contests=lambda case, device: [contest(case, device)],
    names=[*OP.implementations, *(peer.name for peer in PEERS)],
    peers=PEERS,
    bars=BARS,
)


def test_grad_norm(benchmark, contestant):
    benchmark(contestant)
