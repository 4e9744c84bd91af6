"""`llmsys.append_kv` against PyTorch's `index_put_` and rotation; the ceiling is a plain copy of as many bytes.

A shape is (B, T, S, K, D, E). Beside "ready", every implementation by name, and "public", what a user calls: keys that
are rotated ("rotary"), a cache in pages of 16 tokens ("paged") and an int8 cache ("int8"), called as a user does.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import llmsys
from benchmarks import peers
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import copied, fault_of, same_bits, under
from benchmarks.harness import cannot_time
from benchmarks.ops.bench_rope import formula as rope
from llmsys import _C
from llmsys.ops.append_kv import OP, cases
from llmsys.ops.append_kv.reference import quantise
from llmsys.perf.timer import Timed, sets_for_cold_caches

VARIANTS: dict[str, dict] = {
    "rotary": {"rotary_fraction": 1.0, "per_sequence": True},
    "paged": {"block_size": 16},
    "int8": {"int8": True},
}


def formula(k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, cos, sin, interleaved):
    place = cache_seqlens.unsqueeze(1) + torch.arange(k.shape[1], device=k.device)
    row = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
    if block_table is not None:
        size = k_cache.shape[1]
        row, place = block_table[row, place // size], place % size
    k = k if cos is None else rope(k, cos, sin, interleaved)
    for values, cached, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scales is None:
            cached[row, place] = values
        else:
            cached[row, place], scales[row, place] = quantise(values)


PEERS = peers.torch_peers(formula)


def rotation(case: Case, device: str) -> list[tuple]:
    """Arguments of the op for places that no cache of the machine holds: each set has tokens of its own, and places of
    its own in a cache that is shared by as many sets as there is room for."""
    first = cases.inputs(case.shape, getattr(torch, case.dtype), device, **VARIANTS.get(case.mode, {}))
    tokens, room = case.shape[1:3]
    sets = []
    for index in range(sets_for_cold_caches(cases.traffic("forward", *first), device)):
        nth = index % (room // tokens)
        caches = copied(first[2:6]) if nth == 0 else sets[-1][2:6]
        sets.append((*copied(first[:2]), *caches, torch.full_like(first[6], nth * tokens), *first[7:]))
    return sets


def public(*args: object) -> None:
    """As a user calls it."""
    llmsys.append_kv(**dict(zip(OP.forward_schema.names, args, strict=True)))  # type: ignore[arg-type]


def on(sets: list[tuple], function: Callable) -> Timed:
    """`function` of one set of arguments after the other."""
    return lambda index: function(*sets[index % len(sets)])


def written(function: Callable, args: tuple) -> list[Tensor]:
    """The caches and scales after `function`."""
    args = copied(args)
    function(*args)
    return [args[i] for i in OP.written if args[i] is not None]


def contest_of(case: Case, device: str) -> Contest:
    """Every implementation that is right, or the one that is chosen, and who it is measured against."""
    variant = VARIANTS.get(case.mode, {})
    sets = rotation(case, device)
    first = sets[0]
    contest = Contest(OP.name, case, num_sets=len(sets), bytes=cases.traffic("forward", *first))
    contest.flops = cases.flops("forward", *first)
    gate = partial(fault_of, OP, cases, shape=case.shape, dtype=case.dtype, device=device, **variant)
    if case.mode == "ready":
        _enter_implementations(contest, sets, gate, device)
        return contest
    chosen = str(OP.explain(*first).chosen)
    wrong = gate(chosen)
    if wrong is None and not same_bits(written(public, first), written(OP, first)):
        wrong = "llmsys.append_kv writes other bits than the op it calls"
    contest.enter(chosen, on(sets, public), wrong)
    torch.compiler.reset()  # each case compiles for its own shape; without this, torch.compile stops after eight
    for peer in PEERS:
        contest.peers[peer.name] = peer.why_not(device) or on(sets, peer.build())
    return contest


def _enter_implementations(contest: Contest, sets: list[tuple], gate: Callable, device: str) -> None:
    """Each by name; the CPU's under each instruction set."""
    for name, implementation in OP.implementations.items():
        reason = cannot_time(name) or implementation.reason(device, sets[0])
        if reason:
            contest.implementations[name] = reason
            continue
        for isa in reversed(_C.cpu.isas()) if name == "cpu" else [None]:
            run = implementation.forward if isa is None else under(isa, implementation.forward)
            label = name if isa in (None, _C.cpu.isa()) else f"{name}[{isa}]"
            contest.enter(label, on(sets, run), gate(name, isa=isa) if isa else gate(name))


BENCH = Bench(
    op=OP.name,
    plan=[Case(mode, "forward", shape) for shape in cases.LARGE for mode in ("ready", "public", *VARIANTS)],
    contests=lambda case, device: [contest_of(case, device)],
    names=[*OP.implementations, *(peer.name for peer in PEERS)],
    peers=PEERS,
)


def test_append_kv(benchmark, contestant):
    benchmark(contestant)
