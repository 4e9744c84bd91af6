"""Time an op: every implementation and every peer in interleaved rounds, each only after its results proved right.

Two modes. "ready" calls an implementation's own `forward` or `backward` into outputs that exist: it shows the kernel.
"public" calls what a user calls, allocation and autograd included: it shows what a user gets.
`bytes` of a public forward+backward is the sum of both directions.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

import llmsys
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import copied, fault_of, fault_of_out, same_bits, tensors, under
from benchmarks.peers import Peer, torch_peers
from llmsys import _C, env
from llmsys.ops._op import Op
from llmsys.ops._verify import leaves
from llmsys.perf.timer import sets_for_cold_caches

WAYS = (("ready", "forward"), ("ready", "backward"), ("public", "forward"), ("public", "forward+backward"))


def bench_op(
    op: Op,
    cases: ModuleType,
    formula: Callable,
    peers: Sequence[Peer] = (),
    bars: Sequence[Bar] = (),
    function: Callable | None = None,
    gradients_out: int | None = None,
) -> Bench:
    """The benchmark of `op`: by itself, the large shapes in every mode and direction.

    `formula` is the op as PyTorch's users write it, of the forward's arguments: it competes eager and compiled.
    `function` is what a user calls, of the same arguments, where the public function does more than the op.
    `gradients_out` says how many of the backward's first results its `out` takes, where it is not all large ones.
    """
    peers = (*torch_peers(formula), *peers)
    return Bench(
        op=op.name,
        plan=[Case(mode, direction, shape) for shape in cases.LARGE for mode, direction in WAYS],
        contests=lambda case, device: [op_contest(op, cases, peers, case, device, function, gradients_out)],
        names=[*op.implementations, *(peer.name for peer in peers)],
        peers=peers,
        bars=bars,
    )


def op_contest(
    op: Op,
    cases: ModuleType,
    peers: Sequence[Peer],
    case: Case,
    device: str = "cpu",
    function: Callable | None = None,
    gradients_out: int | None = None,
) -> Contest:
    """Every implementation of `op`, checked, and every peer, on buffers that live as long as the contest."""
    args = cases.inputs(case.shape, getattr(torch, case.dtype), device=device)
    contest = Contest(op.name, case)
    for direction in case.direction.split("+"):
        contest.bytes += cases.traffic(direction, *args)
        contest.flops += cases.flops(direction, *args)
    gate = partial(fault_of, op, cases, shape=case.shape, dtype=case.dtype, device=device)
    if case.mode == "ready":
        _enter_implementations(contest, op, args, gate, device, gradients_out)
    else:
        _enter_public(contest, op, args, gate, device, function)
        _enter_peers(contest, peers, device)
    return contest


def _enter_implementations(
    contest: Contest, op: Op, args: tuple, gate: Callable, device: str, gradients_out: int | None
) -> None:
    """Each implementation by name, into outputs that exist; the CPU's under each instruction set."""
    case = contest.case
    if case.direction == "backward":
        args = backward_args(op, args)
    results = tensors(getattr(op.implementations["reference"], case.direction)(*args))
    out = large_results(results[: op.num_public if case.direction == "forward" else gradients_out])
    contest.num_sets = num_sets(case, (args, out), device)
    sets = [(copied(args), copied(out)) for _ in range(contest.num_sets)]
    for name, implementation in op.implementations.items():
        reason = cannot_time(name) or implementation.reason(device, forward_view(op, args, case.direction))
        if reason:
            contest.implementations[name] = reason
            continue
        run = getattr(implementation, case.direction)
        if name != "cpu":
            contest.enter(name, partial(_run_ready, run, sets), gate(name) or fault_of_out(run, *sets[0]))
            continue
        for isa in reversed(_C.cpu.isas()):
            label, timed = (name, run) if isa == _C.cpu.isa() else (f"{name}[{isa}]", under(isa, run))
            wrong = gate(name, isa=isa) or fault_of_out(timed, *sets[0])
            contest.enter(label, partial(_run_ready, timed, sets), wrong)


def _run_ready(run: Callable, sets: list, index: int) -> object:
    args, out = sets[index]
    return run(*args, out=out)


def _enter_public(
    contest: Contest, op: Op, args: tuple, gate: Callable, device: str, function: Callable | None
) -> None:
    """The public function, with the implementation it chooses."""
    case = contest.case
    call = function or public_call(getattr(llmsys, op.name), op.forward_schema.names)
    result = call(*args)
    grads = tuple(torch.randn_like(tensor) for tensor in tensors(result))
    contest.num_sets = num_sets(case, (args, grads), device)
    trains = case.direction == "forward+backward"
    copies = [copied(args) for _ in range(contest.num_sets)]
    contest.sets = [(leaves(op, copy) if trains else copy, grads) for copy in copies]
    chosen = str(op.explain(*args).chosen)
    reason = cannot_time(chosen)
    if reason:
        contest.implementations[chosen] = reason
        return
    wrong = gate(chosen)
    direct = op(*args)
    if function is not None:  # it may give the first of several results
        direct = tensors(direct)[: len(tensors(result))]
    if wrong is None and not same_bits(result, direct):
        wrong = f"llmsys.{op.name} gives other bits than the op it calls"
    contest.enter(chosen, partial(_run_public, call, trains, contest.sets), wrong)


def _enter_peers(contest: Contest, peers: Sequence[Peer], device: str) -> None:
    torch.compiler.reset()  # each case compiles for its own shape; without this, torch.compile stops after eight
    trains = contest.case.direction == "forward+backward"
    for peer in peers:
        reason = peer.why_not(device)
        contest.peers[peer.name] = reason or partial(_run_public, peer.build(), trains, contest.sets)


def _run_public(call: Callable, trains: bool, sets: list, index: int) -> Any:
    args, grads = sets[index]
    if not trains:
        return call(*args)
    results = tensors(call(*args))
    inputs = [tensor for tensor in tensors(args) if tensor.requires_grad]
    return torch.autograd.grad(results, inputs, grads)


def public_call(function: Callable, names: Sequence[str]) -> Callable:
    """`function` called with the values of `names`, in its own order, by keyword where it asks for keywords."""
    parameters = inspect.signature(function).parameters
    keyword = [name for name in names if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY]
    positions = [names.index(name) for name in parameters if name in names and name not in keyword]
    if not keyword and positions == sorted(positions):
        return function

    def call(*args: Any) -> Any:
        return function(*(args[i] for i in positions), **{name: args[names.index(name)] for name in keyword})

    return call


def backward_args(op: Op, args: tuple) -> tuple:
    """Arguments of the op's backward: gradients at random, the rest by name from the forward."""
    known = dict(zip(op.forward_schema.names, args, strict=True))
    results = op.implementations["reference"].forward(*args)
    results = dict(zip(op.forward_schema.results, results if isinstance(results, tuple) else (results,), strict=True))
    generator = torch.Generator().manual_seed(0)

    def value(name: str) -> Any:
        if name.startswith("needs_d"):
            return known[name.removeprefix("needs_d")] is not None
        if name.removeprefix("d") in results and name not in results:
            like = results[name.removeprefix("d")]
            return torch.randn(like.shape, generator=generator).bfloat16().to(like.device, like.dtype)
        return results[name] if name in results else known[name]

    return tuple(value(name) for name in op.backward_schema.names)


def forward_view(op: Op, args: tuple, direction: str) -> tuple:
    """Forward arguments as an implementation is asked about; a backward's first gradient stands in for missing ones."""
    if direction == "forward":
        return args
    known = dict(zip(op.backward_schema.names, args, strict=True))
    return tuple(known.get(name, args[0]) for name in op.forward_schema.names)


def large_results(results: Any) -> Any:
    """The results an implementation takes as `out`, alone or as a tuple: not a number for each row or column."""
    large = tuple(tensor for tensor in tensors(results) if tensor.dim() > 1)
    if not large:
        return None  # it makes what it returns, which is small
    return large[0] if len(large) == 1 else large


def num_sets(case: Case, one_set: Any, device: str) -> int:
    if case.caches == "warm":
        return 1
    return sets_for_cold_caches(sum(tensor.nbytes for tensor in tensors(one_set)), device)


def cannot_time(implementation: str) -> str | None:
    if implementation == "triton" and env.triton_interpreted():
        return "runs in Triton's interpreter, whose time says nothing"
    return None
