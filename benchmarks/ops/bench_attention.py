"""`llmsys.attention` against PyTorch's, and against the machine: a matrix product of as many operations ("GEMM").

A shape is (B, T, S, H, K, D, E). Modes beside "ready" and "public", which are causal: "full" attention, a "window" of a
quarter of the keys, and four "packed" sequences, each against causal attention over the same tensors: what they cost
should be in proportion to the pairs that see each other.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import llmsys
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import fault_of, fault_of_out, same_bits, under
from benchmarks.harness import cannot_time
from llmsys import _C, env
from llmsys.ops.attention import OP, cases
from llmsys.perf.timer import sets_for_cold_caches

GEMM, SDPA, CAUSAL, FLASH = "GEMM", "SDPA", "causal", "flash-attn"
TRAINS = "forward+backward"
TOLD_PAIRS = 0.85  # of the speed that the number of pairs would have it
WIDE = 2048  # rows and columns of the matrix product's factors
WAYS = (("ready", "forward"), ("ready", "backward"), ("public", "forward"), ("public", TRAINS))


def options(mode: str, tokens: int) -> dict:
    """What `llmsys.attention` is asked for in this mode, of `tokens` queries and keys."""
    if mode == "window":
        return {"causal": True, "window": (tokens // 4 - 1, -1)}
    return {"causal": mode != "full"}


def starts(tokens: int, device: str) -> Tensor:
    """Where four packed sequences of one length start and end."""
    return torch.arange(5, dtype=torch.int32, device=device) * (tokens // 4)


def pairs(mode: str, tokens: int) -> int:
    """Queries and keys of one head that see each other."""
    quarter = tokens // 4
    return {
        "full": tokens**2,
        "window": tokens * quarter - quarter * (quarter - 1) // 2,
        "packed": 4 * (quarter * (quarter + 1) // 2),
    }.get(mode, tokens * (tokens + 1) // 2)


def _bars() -> tuple[Bar, ...]:
    of_gemm, of_sdpa, proportional = [], [], []
    for shape in cases.LARGE:
        share = 0.75 if shape[-1] == 128 else 0.62
        of_gemm.append(Bar(OP.name, Case("ready", "forward", shape), "times", share, GEMM))
        of_gemm.append(Bar(OP.name, Case("public", TRAINS, shape), "times", 0.55, GEMM))
        of_sdpa.append(Bar(OP.name, Case("public", "forward", shape), "times", 4.5, SDPA))
        of_sdpa.append(Bar(OP.name, Case("public", TRAINS, shape), "times", 3, SDPA))
        for direction in ("forward", TRAINS):
            of_sdpa.append(Bar(OP.name, Case("public", direction, shape, "float32"), "times", 2, SDPA))
    for mode in ("full", "window", "packed"):
        for direction in ("forward", TRAINS):
            shape = cases.LARGE[2]
            expected = pairs("causal", shape[1]) / pairs(mode, shape[1])
            target = round(TOLD_PAIRS * expected, 3)
            proportional.append(Bar(OP.name, Case(mode, direction, shape), "times", target, CAUSAL))
    return (*of_gemm, *of_sdpa, *proportional)


@cache
def fault_at(implementation: str, shape: tuple, dtype: str, device: str, isa: str | None = None) -> str | None:
    """By the rule of the tests, on as many tokens as make several blocks of keys: the reference keeps every score."""
    batch, queries, keys, *rest = shape
    checked = (batch, min(queries, 500), min(keys, 500), *rest)
    return fault_of(OP, cases, implementation, checked, dtype, device, isa)


class Inputs:
    """Tensors in rotation for one case."""

    def __init__(self, case: Case, device: str) -> None:
        dtype = getattr(torch, case.dtype)
        self.case, self.device = case, device
        first = cases.inputs(case.shape, dtype, device)
        one_set = 2 * sum(tensor.nbytes for tensor in first[:3])
        self.num_sets = sets_for_cold_caches(one_set, device)
        self.args = [first, *(cases.inputs(case.shape, dtype, device, seed) for seed in range(1, self.num_sets))]
        y = first[0].shape[:3] + first[2].shape[3:]
        self.dy = torch.randn(y, device=device).to(dtype)
        self.trains = case.direction == TRAINS
        self.leaves = [tuple(x.detach().requires_grad_(self.trains) for x in args[:3]) for args in self.args]

    def differentiated(self, function: Callable, index: int) -> object:
        """`function` of q, k and v, and their gradients where the case trains."""
        leaves = self.leaves[index]
        y = function(*leaves)
        return torch.autograd.grad(y, leaves, self.dy) if self.trains else y

    def ours(self, mode: str, index: int) -> object:
        """`llmsys.attention` as a user calls it."""
        tokens = self.case.shape[1]
        if mode != "packed":
            return self.differentiated(partial(llmsys.attention, **options(mode, tokens)), index)
        bounds = starts(tokens, self.device)
        packed = partial(llmsys.attention, cu_seqlens_q=bounds, cu_seqlens_k=bounds, causal=True)
        return self.differentiated(lambda q, k, v: packed(q[0], k[0], v[0]).unsqueeze(0), index)


def contest_of(case: Case, device: str) -> Contest:
    """Every implementation that is right, the peers, and the matrix product."""
    given = Inputs(case, device)
    contest = Contest(OP.name, case, num_sets=given.num_sets)
    for direction in case.direction.split("+"):
        scale = pairs(case.mode, case.shape[1]) / pairs("causal", case.shape[1])
        contest.flops += round(scale * cases.flops(direction, *given.args[0]))
    contest.peers[GEMM] = gemm(contest.flops, getattr(torch, case.dtype), device)
    if case.mode == "ready":
        _enter_implementations(contest, given, device)
        return contest
    chosen = str(OP.explain(*given.args[0]).chosen)
    wrong = fault_at(chosen, case.shape, case.dtype, device)
    if wrong is None and case.mode == "public" and not given.trains:
        with torch.no_grad():
            same = same_bits(given.ours("public", 0), OP(*given.args[0])[0])
        wrong = None if same else "llmsys.attention gives other bits than the op it calls"
    contest.enter(chosen, partial(given.ours, case.mode), wrong)
    if case.mode == "public":
        contest.peers |= {name: why or partial(given.differentiated, call) for name, call, why in _peers(device)}
    else:
        contest.peers[CAUSAL] = partial(given.ours, "public")
    return contest


def _enter_implementations(contest: Contest, given: Inputs, device: str) -> None:
    """Each by name, into outputs that exist; the CPU's under each instruction set."""
    case, args = contest.case, given.args
    backward = case.direction == "backward"
    for name, implementation in OP.implementations.items():
        reason = cannot_time(name) or implementation.reason(device, args[0])
        if name == "reference":
            reason = "keeps every score: no contestant"
        if reason:
            contest.implementations[name] = reason
            continue
        for isa in reversed(_C.cpu.isas()) if name == "cpu" else [None]:
            run = getattr(implementation, case.direction)
            forward = implementation.forward
            if isa is not None:
                run, forward = under(isa, run), under(isa, forward)
            sets = [forward(*one) for one in args]
            if backward:
                calls = [(given.dy, None, *results, *one, False) for results, one in zip(sets, args, strict=True)]
                sets = [tuple(torch.empty_like(x) for x in one[:3]) for one in args]
            else:
                calls = args
            label = name if isa in (None, _C.cpu.isa()) else f"{name}[{isa}]"
            wrong = fault_at(name, case.shape, case.dtype, device, isa)
            wrong = wrong or fault_of_out(run, calls[0], sets[0])
            contest.enter(label, partial(_run_ready, run, calls, sets), wrong)


def _run_ready(run: Callable, calls: list, sets: list, index: int) -> object:
    return run(*calls[index], out=sets[index])


def gemm(flops: int, dtype: torch.dtype, device: str) -> Callable[[int], object]:
    """A product of two matrices of about `flops` operations: on a CPU `llmsys.linear`, whose rate is the higher."""
    rows = max(round(flops / (2 * WIDE * WIDE)), 1)
    x, weight = (torch.randn(size, WIDE, device=device).to(dtype) for size in (rows, WIDE))
    y = torch.empty(rows, WIDE, dtype=dtype, device=device)
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return lambda index: llmsys.linear(x, weight, out=y)
    return lambda index: torch.mm(x, weight.t(), out=y)


def _peers(device: str) -> list[tuple[str, Callable, str | None]]:
    """(name, function of q, k and v, why not)"""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True)

    missing = None if env.has("flash_attn") else "not installed"
    return [(SDPA, sdpa, None), (FLASH, flash, missing or (None if device == "cuda" else "runs on cuda only"))]


PLAN = (
    *(Case(mode, direction, shape) for shape in cases.LARGE for mode, direction in WAYS),
    *(Case("public", direction, shape, "float32") for shape in cases.LARGE for direction in ("forward", TRAINS)),
    *(Case(mode, way, cases.LARGE[2]) for mode in ("full", "window", "packed") for way in ("forward", TRAINS)),
)

BENCH = Bench(
    op=OP.name,
    plan=PLAN,
    contests=lambda case, device: [contest_of(case, device)],
    names=[*OP.implementations, GEMM, SDPA, CAUSAL, FLASH],
    bars=_bars(),
)


def test_attention(benchmark, contestant):
    benchmark(contestant)
