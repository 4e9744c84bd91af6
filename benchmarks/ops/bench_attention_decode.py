"""`llmsys.attention_decode` against PyTorch's attention, and the machine: a plain read of as many bytes ("read").

A shape is (B, T, S, H, K, D, E). Modes beside "ready" and "public": an "int8" cache, against one of the queries' dtype,
and one in pages of 16 tokens ("paged").
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import llmsys
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import fault_of, fault_of_out, same_bits, under
from benchmarks.harness import cannot_time
from llmsys import _C
from llmsys.ops.attention_decode import OP, cases
from llmsys.perf.ceilings import reader
from llmsys.perf.timer import Timed, sets_for_cold_caches

READ, SDPA, WIDE = "read", "SDPA", "cache of q's dtype"
VARIANTS: dict[str, dict] = {"int8": {"int8": True}, "paged": {"block_size": 16}}
NAMES = "q", "k_cache", "v_cache", "cache_seqlens", "block_table", "k_scale", "v_scale"


def rotation(case: Case, device: str, **variant: object) -> list[tuple]:
    """Arguments of the op in as many copies as caches do not hold."""
    first = cases.inputs(case.shape, getattr(torch, case.dtype), device, full=True, **variant)
    num_sets = sets_for_cold_caches(cases.traffic("forward", *first), device)
    copies = [[x.clone() if isinstance(x, Tensor) else x for x in first] for _ in range(num_sets - 1)]
    return [first, *map(tuple, copies)]


def public(args: tuple) -> Tensor:
    """As a user calls it."""
    return llmsys.attention_decode(**dict(zip(NAMES, args, strict=False)))


def sdpa(args: tuple) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in args[:3])
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def on(sets: list[tuple], function: Callable) -> Timed:
    """`function` of one set of arguments after the other."""
    return lambda index: function(sets[index % len(sets)])


def contest_of(case: Case, device: str) -> Contest:
    """Every implementation that is right, or the one that is chosen, and who it is measured against."""
    variant = VARIANTS.get(case.mode, {})
    sets = rotation(case, device, **variant)
    contest = Contest(OP.name, case, num_sets=len(sets), flops=cases.flops("forward", *sets[0]))
    num_bytes = cases.traffic("forward", *sets[0])
    gate = partial(fault_of, OP, cases, shape=case.shape, dtype=case.dtype, device=device, full=True, **variant)
    if case.mode == "ready":
        _enter_implementations(contest, sets, gate, device)
    else:
        chosen = str(OP.explain(*sets[0]).chosen)
        wrong = gate(chosen)
        if wrong is None and not same_bits(public(sets[0]), OP(*sets[0])[0]):
            wrong = "llmsys.attention_decode gives other bits than the op it calls"
        contest.enter(chosen, on(sets, public), wrong)
    contest.peers[READ] = reader(num_bytes, len(sets), device) or f"reads are measured on the CPU only, given {device}"
    if case.mode == "int8":
        contest.peers[WIDE] = on(rotation(case, device), public)
    if case.mode == "public":
        contest.peers[SDPA] = on(sets, sdpa)
    return contest


def _enter_implementations(contest: Contest, sets: list[tuple], gate: Callable, device: str) -> None:
    """Each by name, into outputs that exist; the CPU's under each instruction set."""
    for name, implementation in OP.implementations.items():
        reason = cannot_time(name) or implementation.reason(device, sets[0])
        if name == "reference":
            reason = "copies the cache: no contestant"
        if reason:
            contest.implementations[name] = reason
            continue
        for isa in reversed(_C.cpu.isas()) if name == "cpu" else [None]:
            run = implementation.forward if isa is None else under(isa, implementation.forward)
            out = tuple(torch.empty_like(x) for x in run(*sets[0]))
            label = name if isa in (None, _C.cpu.isa()) else f"{name}[{isa}]"
            wrong = (gate(name, isa=isa) if isa else gate(name)) or fault_of_out(run, sets[0], out)
            contest.enter(label, on(sets, lambda args, run=run, out=out: run(*args, out=out)), wrong)


def _bars() -> tuple[Bar, ...]:
    bars = [Bar(OP.name, Case("ready", "forward", shape), "times", 0.8, READ) for shape in cases.LARGE]
    return (*bars, *(Bar(OP.name, Case("int8", "forward", shape), "times", 1.6, WIDE) for shape in cases.LARGE))


BENCH = Bench(
    op=OP.name,
    plan=[Case(mode, "forward", shape) for shape in cases.LARGE for mode in ("ready", "public", *VARIANTS)],
    contests=lambda case, device: [contest_of(case, device)],
    names=[*OP.implementations, READ, SDPA, WIDE],
    bars=_bars(),
)


def test_attention_decode(benchmark, contestant):
    benchmark(contestant)
