"""`llmsys.attention` against PyTorch's, and against the machine: a matrix product of as many operations ("GEMM").

A shape is (B, T, S, H, K, D, E). Modes beside "ready" and "public", which are causal: "full" attention, a "window" of a
quarter of the keys, and four "packed" sequences, each against causal attention over the same tensors: what they cost
should be in proportion to the pairs that see each other. What `flex_attention` is told of the mask is made beforehand.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import llmsys
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import fault_of, fault_of_out, same_bits, tensors, under
from benchmarks.harness import cannot_time
from benchmarks.peers import compiler_missing
from llmsys import _C, env
from llmsys.ops._verify import judge
from llmsys.ops.attention import OP, cases, reference
from llmsys.perf.timer import sets_for_cold_caches

GEMM, SDPA, CAUSAL, FLASH, FLEX = "GEMM", "SDPA", "causal", "flash-attn", "flex_attention"
TRAINS = "forward+backward"
TOLD_PAIRS = 0.85  # of the speed that the number of pairs would have it
WIDE = 2048  # rows and columns of the matrix product's factors
TOLD_QUERIES = 64  # by whose results a peer is judged
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
    if case.mode != "public":
        contest.peers[CAUSAL] = partial(given.ours, "public")
    torch.compiler.reset()  # each case compiles for its own shape; without this, torch.compile stops after eight
    for name, build, why in _peers(given):
        contest.peers[name] = why or _entered(given, build())
    return contest


def _entered(given: Inputs, call: Callable) -> Callable | str:
    """The peer `call`, of q, k and v, or what is wrong with its results."""
    fault = peer_fault(given, call)
    return f"wrong: {fault}" if fault else partial(given.differentiated, call)


def peer_fault(given: Inputs, call: Callable) -> str | None:
    """None when what the last queries make with the first key head is right by the rule of the tests: outputs, or
    gradients, and, where no other queries see them, those of the last keys and values."""
    case, tokens = given.case, given.case.shape[1]
    last, heads = min(TOLD_QUERIES, tokens // 4), case.shape[3] // case.shape[4]
    bounds = (None, None)
    if case.mode == "packed":
        bounds = torch.tensor([0, 0, 0, 0, last], dtype=torch.int32, device=given.device), starts(tokens, given.device)
    window = options(case.mode, tokens).get("window", (-1, -1))[0], -1 if case.mode == "full" else 0

    def expected(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x[:1, :, :count].to(dtype) for x, count in zip(given.args[0], (heads, 1, 1), strict=False))
        told = (q[:, -last:], k, v, None, None, None, *bounds, None, 64, *window, q.shape[-1] ** -0.5, 0.0, 0.0, 0)
        y, lse = reference.forward(*told)
        if not given.trains:
            return [y]
        dq, dk, dv, *_ = reference.backward(given.dy[:1, -last:, :heads].to(dtype), None, y, lse, *told, False)
        return [dq] if case.mode == "full" else [dq, dk[:, -last:], dv[:, -last:]]

    found = given.differentiated(call, 0)
    same, truth = expected(given.dy.dtype), expected(torch.float64)
    names = ("dq", "dk", "dv") if given.trains else ("y",)
    verdicts = [
        judge(name, [(ours[:1, -last:, : true.shape[2]], of_reference, true)])
        for name, ours, of_reference, true in zip(names, tensors(found), same, truth, strict=False)
    ]
    return "; ".join(str(verdict) for verdict in verdicts if not verdict.right) or None


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


def _peers(given: Inputs) -> list[tuple[str, Callable, str | None]]:
    """(name, what makes a function of q, k and v, why not)"""
    device = given.device

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    def flash() -> Callable:
        from flash_attn import flash_attn_func

        return partial(flash_attn_func, causal=True)

    flexible = (FLEX, partial(flex, given.case, device), _no_flex(given))
    if given.case.mode != "public":
        return [flexible]
    missing = None if env.has("flash_attn") else "not installed"
    missing = missing or (None if device == "cuda" else "runs on cuda only")
    return [(SDPA, lambda: sdpa, None), (FLASH, flash, missing), flexible]


def _no_flex(given: Inputs) -> str | None:
    if given.trains and given.device == "cpu":
        return "PyTorch has no backward of it on the CPU"
    return compiler_missing(given.device)


def flex(case: Case, device: str) -> Callable:
    """PyTorch's `flex_attention`, compiled, for what `case` sees."""
    tokens = case.shape[1]
    window, sequence = tokens // 4, torch.arange(tokens, device=device) // (tokens // 4)
    masks: dict[str, Callable] = {
        "public": lambda b, h, t, s: t >= s,
        "window": lambda b, h, t, s: (t >= s) & (t - s < window),
        "packed": lambda b, h, t, s: (t >= s) & (sequence[t] == sequence[s]),
    }
    mask = masks.get(case.mode)
    seen = None if mask is None else create_block_mask(mask, None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=seen, enable_gqa=True).transpose(1, 2)

    return attend


PLAN = (
    *(Case(mode, direction, shape) for shape in cases.LARGE for mode, direction in WAYS),
    *(Case("public", direction, shape, "float32") for shape in cases.LARGE for direction in ("forward", TRAINS)),
    *(Case(mode, way, cases.LARGE[2]) for mode in ("full", "window", "packed") for way in ("forward", TRAINS)),
)

BENCH = Bench(
    op=OP.name,
    plan=PLAN,
    contests=lambda case, device: [contest_of(case, device)],
    names=[*OP.implementations, GEMM, SDPA, CAUSAL, FLASH, FLEX],
    bars=_bars(),
)


def test_attention(benchmark, contestant):
    benchmark(contestant)
