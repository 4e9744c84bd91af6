"""Time an op: every implementation and every peer in interleaved rounds, each only after its results proved right.

Two modes. "ready" calls an implementation's own `forward` or `backward` into outputs that exist: it shows the kernel.
"public" calls what a user calls, allocation and autograd included: it shows what a user gets.
`bytes` of a public forward+backward is the sum of both directions.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from llmsys.ops._op import Op

import llmsys
from benchmarks.correctness import convert, fault, tensors
from benchmarks.peers import Peer
from llmsys import _C, env
from llmsys.perf.ceilings import bandwidth
from llmsys.perf.report import Row
from llmsys.perf.roofline import percent
from llmsys.perf.timer import Timed, sets_for_cold_caches, time_interleaved

WAYS = (("ready", "forward"), ("ready", "backward"), ("public", "forward"), ("public", "forward+backward"))


@dataclass(frozen=True)
class Case:
    """What is measured. `caches="warm"` keeps one set of buffers, for sizes that a previous op leaves in the caches."""

    mode: str
    direction: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    caches: str = "cold"

    def __str__(self) -> str:
        return f"{self.mode} {self.direction} {'×'.join(map(str, self.shape))} {self.dtype}"


@dataclass
class Contest:
    """What competes in one case: by name, a callable to time or the reason why it cannot be."""

    op: str
    case: Case
    num_sets: int = 1
    bytes: int = 0
    flops: int = 0
    implementations: dict[str, Timed | str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    peers: dict[str, Timed | str] = field(default_factory=dict)

    def enter(self, name: str, call: Timed, fault: str | None) -> None:
        """Take an implementation in, or bar it because its results are wrong."""
        if fault:
            self.wrong.add(name)
        self.implementations[name] = f"wrong: {fault}" if fault else call


@dataclass(frozen=True)
class Bench:
    """A benchmark: the cases it measures by itself, what competes in a case, and everyone's name."""

    op: str
    plan: Sequence[Case]
    contests: Callable[[Case, str], Iterable[Contest]]
    names: Sequence[str]

    def run(self, plan: Iterable[Case] | None = None, *, device: str = "cpu", budget_s: float = 4.0) -> list[Row]:
        """Rows of every case of `plan`, by default its own; `budget_s` seconds of rounds for each contest."""
        plan = self.plan if plan is None else plan
        return [
            row
            for case in plan
            for contest in self.contests(case, device)
            for row in time_contest(contest, device, budget_s)
        ]


def bench_op(op: Op, cases: ModuleType, peers: Sequence[Peer] = ()) -> Bench:
    """The benchmark of `op`: by itself, the large shapes in every mode and direction."""
    return Bench(
        op=op.name,
        plan=[Case(mode, direction, shape) for shape in cases.LARGE for mode, direction in WAYS],
        contests=lambda case, device: [op_contest(op, cases, peers, case, device)],
        names=[*op.implementations, *(peer.name for peer in peers)],
    )


def time_contest(contest: Contest, device: str = "cpu", budget_s: float = 4.0) -> list[Row]:
    """One row per implementation; one without a time says why."""
    calls = {("impl", name): call for name, call in contest.implementations.items() if callable(call)}
    calls |= {("peer", name): call for name, call in contest.peers.items() if callable(call)}
    timings = time_interleaved(calls, num_sets=contest.num_sets, device=device, budget_s=budget_s) if calls else {}
    peers = {name: timings[("peer", name)].median_s if callable(call) else None for name, call in contest.peers.items()}
    case, rows = contest.case, []
    for name, call in contest.implementations.items():
        timing = timings.get(("impl", name))
        share = None
        if timing and contest.bytes and case.caches == "cold":
            share = percent(contest.bytes / bandwidth(device).copy, timing.median_s)
        rows.append(
            Row(
                op=contest.op,
                impl=name,
                mode=case.mode,
                direction=case.direction,
                shape=case.shape,
                dtype=case.dtype,
                caches=case.caches,
                median_s=timing.median_s if timing else None,
                quartiles_s=timing.quartiles_s if timing else None,
                rounds=len(timing.samples_s) if timing else 0,
                bytes=contest.bytes,
                flops=contest.flops,
                ceiling_percent=share,
                peers=peers,
                peers_why_not={name: reason for name, reason in contest.peers.items() if isinstance(reason, str)},
                correct=False if name in contest.wrong else True if timing else None,
                why_not=call if isinstance(call, str) else None,
            )
        )
    return rows


def op_contest(op: Op, cases: ModuleType, peers: Sequence[Peer], case: Case, device: str = "cpu") -> Contest:
    """Every implementation of `op`, checked, and every peer, on buffers that stay alive as long as the contest."""
    args = cases.inputs(case.shape, getattr(torch, case.dtype), device=device)
    contest = Contest(op.name, case)
    for direction in case.direction.split("+"):
        contest.bytes += cases.traffic(direction, *args)
        contest.flops += cases.flops(direction, *args)
    enter = {"ready": _enter_ready, "public": _enter_public}[case.mode]
    enter(contest, op, args, peers, device)
    return contest


def _enter_ready(contest: Contest, op: Op, args: tuple, peers: Sequence[Peer], device: str) -> None:
    """Implementations by name, into outputs that exist. Peers have no such mode."""
    direction, reference = contest.case.direction, op.implementations["reference"]
    exact_args = convert(args, torch.float64)
    if direction == "backward":
        args, exact_args = (backward_args(op, given) for given in (args, exact_args))
    expected, exact = (getattr(reference, direction)(*given) for given in (args, exact_args))
    out = large_results(expected, args)
    contest.num_sets = num_sets(contest.case, (args, out), device)
    sets = [(convert(args), convert(out)) for _ in range(contest.num_sets)]

    for name, implementation in op.implementations.items():
        reason = cannot_time(name) or implementation.reason(device, forward_view(op, args, direction))
        if reason:
            contest.implementations[name] = reason
            continue
        run = getattr(implementation, direction)
        for label, timed in {name: run, **(narrower_isas(run) if name == "cpu" else {})}.items():
            for tensor in tensors(sets[0][1]):
                tensor.fill_(float("nan"))
            got = timed(*sets[0][0], out=sets[0][1])
            contest.enter(label, partial(_run_ready, timed, sets), fault(got, expected, exact, direction))


def _run_ready(run: Callable, sets: list, index: int) -> object:
    args, out = sets[index]
    return run(*args, out=out)


def _enter_public(contest: Contest, op: Op, args: tuple, peers: Sequence[Peer], device: str) -> None:
    """The public function, with whichever implementation it chooses, and the peers."""
    case = contest.case
    trains = case.direction == "forward+backward"
    for tensor in tensors(args):
        tensor.requires_grad_(trains and tensor.is_floating_point())
    call = public_call(getattr(llmsys, op.name), op.forward_schema.names)
    with llmsys.use(**{op.name: "reference"}):
        example = call(*convert(args))
        grads = tuple(torch.randn_like(tensor) for tensor in tensors(example))
        expected, exact = (
            _run_public(call, trains, [(convert(args, dtype), convert(grads, dtype))], 0)
            for dtype in (None, torch.float64)
        )
    contest.num_sets = num_sets(case, (args, grads), device)
    sets = [(convert(args), convert(grads)) for _ in range(contest.num_sets)]
    chosen = op.explain(*args).chosen
    if chosen is None or cannot_time(chosen):
        contest.implementations[str(chosen)] = cannot_time(str(chosen)) or "no implementation can run"
    else:
        got = _run_public(call, trains, sets, 0)
        contest.enter(chosen, partial(_run_public, call, trains, sets), fault(got, expected, exact, case.direction))
    torch.compiler.reset()  # each case compiles for its own shape; without this, torch.compile stops after eight
    for peer in peers:
        reason = peer.why_not(device)
        contest.peers[peer.name] = reason or partial(_run_public, peer.build(), trains, sets)


def _run_public(call: Callable, trains: bool, sets: list, index: int) -> Any:
    args, grads = sets[index]
    if not trains:
        return call(*args)
    results = tensors(call(*args))
    inputs = [tensor for tensor in tensors(args) if tensor.requires_grad]
    return torch.autograd.grad(results, inputs, grads)


def public_call(function: Callable, names: Sequence[str]) -> Callable:
    """`function` called with the values of `names`, by keyword where its signature asks for keywords."""
    parameters = inspect.signature(function).parameters
    keyword = [name for name in names if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY]
    positions = [i for i, name in enumerate(names) if name not in keyword]
    if not keyword:
        return function

    def call(*args: Any) -> Any:
        return function(*(args[i] for i in positions), **{name: args[names.index(name)] for name in keyword})

    return call


def backward_args(op: Op, args: tuple) -> tuple:
    """Arguments of the op's backward: gradients of ones' size at random, the rest by name from the forward."""
    known = dict(zip(op.forward_schema.names, args, strict=True))
    results = op.implementations["reference"].forward(*args)
    results = dict(zip(op.forward_schema.results, results if isinstance(results, tuple) else (results,), strict=True))
    generator = torch.Generator().manual_seed(0)

    def value(name: str) -> Any:
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


def large_results(results: Any, args: tuple) -> Any:
    """The results an implementation takes as `out`: those of the first argument's shape, alone or as a tuple."""
    shape = tensors(args)[0].shape
    large = tuple(tensor for tensor in tensors(results) if tensor.shape == shape)
    return large[0] if len(large) == 1 else large


def num_sets(case: Case, one_set: Any, device: str) -> int:
    if case.caches == "warm":
        return 1
    return sets_for_cold_caches(sum(tensor.nbytes for tensor in tensors(one_set)), device)


def narrower_isas(run: Callable) -> dict[str, Callable]:
    """`run` under each instruction set below the one in use, as "cpu:avx2"."""
    used = _C.cpu.isa()

    def under(isa: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            _C.cpu.select_isa(isa)
            try:
                return run(*args, **kwargs)
            finally:
                _C.cpu.select_isa(used)

        return call

    isas = _C.cpu.isas()
    return {f"cpu:{isa}": under(isa) for isa in isas[: isas.index(used)]}


def cannot_time(implementation: str) -> str | None:
    if implementation == "triton" and env.triton_interpreted():
        return "runs in Triton's interpreter, whose time says nothing"
    return None


def rotating(call: Timed, num_sets: int) -> Callable[[], object]:
    """`call` without arguments, each time on the next set of buffers."""
    indices: Iterator[int] = itertools.cycle(range(num_sets))
    return lambda: call(next(indices))
