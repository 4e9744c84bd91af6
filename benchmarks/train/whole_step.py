"""One training step of a Llama of transformers: untouched, compiled, and after `llmsys.accelerate`.

Forward, backward, clipping by the norm, AdamW, on fixed tokens. Each contender has a process of its own, whose memory
is its own; they take turns, a step each. Parameters are bfloat16 or float32 without masters. PyTorch's AdamW is the
fused one, with states of the parameters' dtype; llmsys's has float32 states, or 8-bit ones where the name says so.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import llmsys
from benchmarks.bars import Bar
from benchmarks.contest import Case
from llmsys.ops._verify import judge
from llmsys.perf.report import Row
from llmsys.perf.timer import time_interleaved
from llmsys.train.peak_memory import PeakMemory
from llmsys.train.worker import Commands, Worker

SIZES = {  # 61.6 M parameters
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1664,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
BATCH = (4, 512)
NAME = "LlamaForCausalLM 62 M"
EIGHT_BIT = "llmsys, 8-bit AdamW"
OURS, PEERS = ("llmsys", EIGHT_BIT), ("eager", "torch.compile")
WARM_UP, ROUNDS = 3, 11
CASES = tuple(Case("public", "step", BATCH, dtype) for dtype in ("bfloat16", "float32"))
BARS = (
    Bar(NAME, CASES[0], "times", 1.4, "eager"),
    Bar(NAME, CASES[0], "times", 1.2, "torch.compile"),
    Bar(NAME, CASES[0], "memory", 0.6, "eager"),
    Bar(NAME, CASES[0], "memory", 0.6, "eager", EIGHT_BIT),
    Bar(NAME, CASES[1], "times", 1.8, "eager"),
)

# What an operator of the profiler's list is, by the start of its name. The first that fits counts.
KINDS = {
    "head and loss": ("linear_cross_entropy", "aten::_log_softmax", "aten::nll_loss"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "linear", "mlp"),
    "attention": ("attention", "aten::_scaled_dot_product"),
    "optimizer and clipping": ("Optimizer.", "adamw", "grad_norm", "llmsys::adamw", "llmsys::grad_norm"),
    "memory-bound": ("",),
}


@dataclass(frozen=True)
class Result:
    """Rows of ours; seconds of a profiled step of the first by kind, "Python" being what no operator accounts for."""

    rows: list[Row]
    seconds: dict[str, float]


def model_of(dtype: torch.dtype, **sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(dtype).train()


def tokens_of(shape: tuple[int, ...], vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def commands(contender: str, dtype: torch.dtype, shape: tuple[int, ...], sizes: dict[str, int]) -> Commands:
    """What a worker answers to: "step", "memory", "profile"."""
    import transformers

    assert transformers.LlamaForCausalLM  # imported, which takes memory that is nobody's
    memory = PeakMemory()
    model = model_of(dtype, **sizes)
    tokens = tokens_of(shape, model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    called = torch.compile(model) if contender == "torch.compile" else model
    if contender in OURS:
        llmsys.accelerate(model)
    optimizer = optimizer_of(contender, model)

    def step() -> None:
        called(input_ids=tokens, labels=tokens).loss.backward()
        if contender in OURS:
            _, grad_scale = llmsys.optim.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step(grad_scale=grad_scale)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()

    return {"step": step, "memory": memory.extra_bytes, "profile": lambda: profile(step)}


def optimizer_of(contender: str, model: nn.Module) -> Any:
    if contender in PEERS:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    optimizer = llmsys.optim.AdamW8bit if contender == EIGHT_BIT else llmsys.optim.AdamW
    return optimizer(model.parameters(), lr=1e-4, master_weights=False)


def profile(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of one step by kind of operator."""
    with torch.profiler.profile() as profiler:
        start = time.perf_counter()
        step()
        wall_s = time.perf_counter() - start
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next(k for k, starts in KINDS.items() if event.key.startswith(starts))
        seconds[kind] += event.self_cpu_time_total / 1e6
    return {**{kind: seconds[kind] for kind in KINDS}, "Python": max(0.0, wall_s - seconds.total())}


def fault_of(dtype: torch.dtype, shape: tuple[int, ...], **sizes: int) -> str | None:
    """None when loss and gradients of the accelerated model are right by the rule of the tests: truth is the untouched
    model in float32 (bfloat16) or float64."""
    wide = {torch.bfloat16: torch.float32, torch.float32: torch.float64}[dtype]
    found = []
    for change, as_dtype in ((llmsys.accelerate, dtype), (lambda model: None, dtype), (lambda model: None, wide)):
        model = model_of(dtype, **sizes).to(as_dtype)
        change(model)
        tokens = tokens_of(shape, model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append({f"d{name}": parameter.grad for name, parameter in model.named_parameters()})
    ours, same, truth = found
    verdicts = [judge(name, [(ours[name], same[name], true)]) for name, true in truth.items()]
    return "; ".join(str(verdict) for verdict in verdicts if not verdict.right) or None


def run(cases: Sequence[Case] = CASES, rounds: int = ROUNDS, **sizes: int) -> list[Result]:
    """Each case: correctness, then the contenders' steps in turn, then their memory, then where our time went."""
    return [_run(case, rounds, sizes) for case in cases]


def _run(case: Case, rounds: int, sizes: dict[str, int]) -> Result:
    dtype = getattr(torch, case.dtype)
    fault = fault_of(dtype, (1, min(64, case.shape[1])), **sizes)
    if fault:
        return Result([_row(case, name, correct=False, why_not=f"wrong: {fault}") for name in OURS], {})
    workers = {name: Worker(name, commands, name, dtype, case.shape, sizes) for name in (*OURS, *PEERS)}
    try:
        calls = {name: partial(_ask_step, worker) for name, worker in workers.items()}
        timings = time_interleaved(calls, rounds=rounds, min_rounds=rounds, warmup=WARM_UP, budget_s=0.0)
        peak_bytes = {name: worker.ask("memory") for name, worker in workers.items()}
        seconds = workers["llmsys"].ask("profile")
    finally:
        for worker in workers.values():
            worker.close()
    rows = [
        _row(
            case,
            name,
            median_s=timings[name].median_s,
            quartiles_s=timings[name].quartiles_s,
            rounds=len(timings[name].samples_s),
            peers={peer: timings[peer].median_s for peer in PEERS},
            peak_bytes=peak_bytes[name],
            peers_peak_bytes={peer: peak_bytes[peer] for peer in PEERS},
            correct=True,
        )
        for name in OURS
    ]
    return Result(rows, seconds)


def _ask_step(worker: Worker, index: int) -> None:
    worker.ask("step")


def _row(case: Case, impl: str, **values: Any) -> Row:
    where: dict[str, Any] = {"mode": case.mode, "direction": case.direction, "shape": case.shape, "dtype": case.dtype}
    return Row(op=NAME, impl=impl, caches=case.caches, **where, **values)


def table(results: Sequence[Result]) -> Table:
    """Tokens per second and peak memory of every contender."""
    shown = Table(title=f"{NAME}: forward, backward, clipping, AdamW")
    for heading in ("case", "contender"):
        shown.add_column(heading)
    for heading in ("s a step", "tokens/s", "× the time of llmsys", "peak memory, MiB"):
        shown.add_column(heading, justify="right")
    for result in results:
        shown.add_section()
        first = result.rows[0]
        case = f"{first.shape[0]}×{first.shape[1]} tokens {first.dtype}"
        if first.median_s is None:
            shown.add_row(case, first.impl, first.why_not)
            continue
        contenders = {row.impl: (row.median_s, row.peak_bytes) for row in result.rows}
        contenders |= {name: (first.peers[name], first.peers_peak_bytes[name]) for name in first.peers}
        for name, (seconds, peak) in contenders.items():
            assert seconds is not None and peak is not None
            rate, ratio = first.shape[0] * first.shape[1] / seconds, seconds / first.median_s
            shown.add_row(case, name, f"{seconds:.3f}", f"{rate:,.0f}", f"{ratio:.2f}", f"{peak / 2**20:,.0f}")
            case = ""
    return shown


def where_table(results: Sequence[Result]) -> Table:
    """Where the time of our step goes."""
    shown = Table(title="Where our step's time goes, % (one step under the profiler)")
    shown.add_column("case")
    for kind in (*KINDS, "Python"):
        shown.add_column(kind, justify="right")
    for result in results:
        total = sum(result.seconds.values())
        shares = [f"{100 * seconds / total:.0f}" for seconds in result.seconds.values()]
        shown.add_row(result.rows[0].dtype, *shares)
    return shown


def as_record(results: Sequence[Result]) -> dict[str, Any]:
    return {"seconds_by_kind": {result.rows[0].dtype: result.seconds for result in results}}
