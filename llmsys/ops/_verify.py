"""Is an implementation right? One rule, used by the tests, by `llmsys doctor` and before every benchmark.

Truth is the reference in float64. An implementation may err by twice (gradients: three times) what the reference itself
errs in the same dtype, plus one rounding of the element. No tolerance is picked by hand. Codes of a quantisation, which
are integers, may be one off: where rounding breaks a tie; the op's own test shows that it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from llmsys.ops._cases import random
from llmsys.ops._op import ListOp, Op, use

Layout = Callable[[torch.Tensor], torch.Tensor]
# What an implementation has, what the reference has in the same dtype, the truth.
Triple = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
TRIED, SAMPLES, DRAWS = 512, 256, 32  # elements on which an implementation is tried, on which the reference is; draws


@dataclass(frozen=True)
class Verdict:
    """How far one result of an implementation is from the truth, and how far it may be."""

    result: str  # "y", "dx", …
    error: float  # largest |result - truth| - one rounding of the element
    allowed: float
    special: bool  # NaN and infinities are where the reference has them

    @property
    def right(self) -> bool:
        return self.special and self.error <= self.allowed

    def __str__(self) -> str:
        where = "" if self.special else ", and NaN or infinity where the reference has none or the other way round"
        return f"{self.result}: error {self.error:.3g}, allowed {self.allowed:.3g}{where}"


def verify(
    op: Op,
    cases: ModuleType,
    implementation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    layout: Layout = lambda tensor: tensor,
    only: int | None = None,
    **variant: Any,
) -> list[Verdict]:
    """Verdicts on every result and gradient of `implementation`, which is called by name.

    `layout` turns each input and gradient into one with the same values and other strides; `only` lets the gradient
    arrive at that one of the op's results alone. A small shape is drawn several times, and the reference further on its
    own until it has erred on SAMPLES elements of each result, so that those on which it happens to be exact do not set
    the rule.
    """
    worst: dict[str, list[Triple]] = {}
    elements = sum(shape) if isinstance(op, ListOp) else torch.Size(shape).numel()
    for seed in range(DRAWS):
        args = _each(layout, cases.inputs(shape, dtype, device, seed, **variant))
        plain: Layout = lambda tensor: layout(tensor).contiguous()  # noqa: E731
        truth = dict(run(op, "reference", _wide(args), seed, dtype, plain, only))
        same = dict(run(op, "reference", args, seed, dtype, plain, only))
        ours = {}
        if (seed + 1) * elements <= TRIED or seed == 0:
            ours = dict(run(op, implementation, args, seed, dtype, layout, only))
        for name, true in truth.items():
            worst.setdefault(name, []).append((ours.get(name), same[name], true))
        if not ours and min(true.numel() for true in truth.values()) * seed >= SAMPLES:
            break
    return [judge(name, triples) for name, triples in worst.items()]


def run(
    op: Op,
    implementation: str,
    args: tuple,
    seed: int,
    dtype: torch.dtype,
    layout: Layout = lambda tensor: tensor,
    only: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each result, then of each gradient, of the op forced to `implementation`.

    The gradients that arrive are standard normal, rounded to `dtype`: the same numbers for every implementation.
    """
    if isinstance(op, ListOp):
        yield from _run_list(op, implementation, args, layout)
        return
    args = leaves(op, args)
    given_here = [i for i in op.differentiable if args[i] is not None]
    tensors = [args[i] for i in given_here]
    names = [f"d{op.forward_schema.names[i]}" for i in given_here]
    with use(**{op.name: implementation}):
        results = op(*args)
        results = results if isinstance(results, tuple) else (results,)
        yield from zip(op.forward_schema.results, (result.detach() for result in results), strict=False)
        arriving = [(i, result) for i, result in enumerate(results) if only in (None, i)]
        given = [
            layout(random(1000 + seed + i, "cpu", (tuple(result.shape), dtype))[0].to(result.device, result.dtype))
            for i, result in arriving
        ]
        gradients = torch.autograd.grad([result for _, result in arriving], tensors, given)
    yield from zip(names, gradients, strict=True)


def _run_list(op: ListOp, implementation: str, args: tuple, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the result, then of each list that is written, as one vector. `args` stay as they are."""
    args = _each(lambda tensor: layout(tensor.clone()), args)
    with use(**{op.name: implementation}):
        result = op(*args)
    if result is not None:
        yield op.forward_schema.results[0], result
    for i in op.written:
        if args[i]:
            yield op.forward_schema.names[i], torch.cat([tensor.flatten() for tensor in args[i]])


def leaves(op: Op, args: tuple) -> tuple:
    """`args` outside any graph, those that `op` gives a gradient asking for one."""
    return tuple(
        arg.detach().requires_grad_(i in op.differentiable) if isinstance(arg, torch.Tensor) else arg
        for i, arg in enumerate(args)
    )


def _wide(args: tuple) -> tuple:
    """`args` with floats in float64; integers are what they are."""
    return _each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, args)


def _each(change: Layout, args: tuple) -> tuple:
    """`args` with every tensor changed, those in lists too."""

    def changed(arg: Any) -> Any:
        if isinstance(arg, list):
            return [change(tensor) for tensor in arg]
        return change(arg) if isinstance(arg, torch.Tensor) else arg

    return tuple(changed(arg) for arg in args)


def judge(name: str, triples: list[Triple]) -> Verdict:
    """The rule: how far the first tensors of `triples` are from the last, and the second. Where there is no first one,
    the reference shows how it errs.
    """
    ours, same, true = (_flat(column) for column in zip(*[t for t in triples if t[0] is not None], strict=True))
    dtype = triples[0][1].dtype
    if not dtype.is_floating_point:
        return Verdict(name, (ours - true).abs().max().item() if len(true) else 0.0, 1.0, True)
    special = bool((ours.isnan() == same.isnan()).all() and (ours.isinf() == same.isinf()).all())
    _, all_same, all_true = zip(*triples, strict=True)
    reference = (_flat(all_same) - _flat(all_true)).abs()
    reference = reference[reference.isfinite()]
    finite = true.isfinite() & same.isfinite()
    if not finite.any():
        return Verdict(name, 0.0, 0.0, special)
    ours, true = ours[finite], true[finite]
    rounding = torch.finfo(dtype).eps / 2 * true.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    factor = 3 if name.startswith("d") else 2
    error = ((ours - true).abs() - rounding).clamp(min=0).max().item()
    return Verdict(name, error, factor * reference.max().item(), special)


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten().cpu() for tensor in tensors])
