"""Is an implementation right? One rule, used by the tests, by `llmsys doctor` and before every benchmark.

Truth is the reference in float64. An implementation may err by twice (gradients: three times) what the reference itself
errs in the same dtype, plus one rounding of the element. No tolerance is picked by hand. Codes of a quantisation, which
are integers, may be one off: where rounding breaks a tie; the op's own test shows that it is one.

In a result of a few elements one badly conditioned one may decide, and the reference may happen to be exact on it,
however many are drawn: there, what it errs on inputs a rounding away counts, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from llmsys.ops._cases import random
from llmsys.ops._op import InPlaceOp, ListOp, Op, use

Layout = Callable[[torch.Tensor], torch.Tensor]
# What an implementation has, what the reference has in the same dtype, the truth.
Triple = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
TRIED, SAMPLES, DRAWS = 512, 256, 32  # elements on which an implementation is tried, on which the reference is; draws
NEIGHBOURS = 16  # of each draw, a rounding away
PLENTY = 1 << 16  # elements of a result that need no second draw
BLOCK = 1 << 18  # elements judged at a time


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


@dataclass(frozen=True)
class Draw:
    """Forward arguments, and what the reference makes of them: by the name of each result and gradient."""

    seed: int
    args: tuple
    tried: bool  # whether an implementation is to be run on these arguments
    same: dict[str, torch.Tensor]  # in their dtype
    truth: dict[str, torch.Tensor]  # in float64


@dataclass(frozen=True)
class Yardstick:
    """What any implementation of `op` is held against in one case."""

    op: Op
    dtype: torch.dtype
    layout: Layout
    only: int | None
    draws: list[Draw]

    def verdicts(self, implementation: str) -> list[Verdict]:
        """One for every result and gradient of `implementation`, which is called by name."""
        found = [
            dict(run(self.op, implementation, draw.args, draw.seed, self.dtype, self.layout, self.only))
            if draw.tried
            else {}
            for draw in self.draws
        ]
        verdicts = self._judged(found, self.draws)
        small = {name for name, true in self.draws[0].truth.items() if true.numel() < SAMPLES}
        if all(verdict.right or verdict.result not in small for verdict in verdicts):
            return verdicts  # neighbours only ever allow more
        neighbours = [draw for each in self.draws if each.tried for draw in self._neighbours(each)]
        again = self._judged([*found, *({} for _ in neighbours)], [*self.draws, *neighbours])
        return [new if new.result in small else old for old, new in zip(verdicts, again, strict=True)]

    def _judged(self, found: list[dict[str, torch.Tensor]], draws: list[Draw]) -> list[Verdict]:
        pairs = list(zip(found, draws, strict=True))
        return [
            judge(name, [(ours.get(name), draw.same[name], draw.truth[name]) for ours, draw in pairs])
            for name in self.draws[0].truth
        ]

    def _neighbours(self, draw: Draw) -> Iterator[Draw]:
        """`draw` with each number of its arguments moved by about a unit in its last place, up or down by lot."""
        generator = torch.Generator().manual_seed(draw.seed)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            signs = torch.randint(2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
            return (tensor.double() * (1 + torch.finfo(tensor.dtype).eps * signs)).to(tensor.dtype)

        for _ in range(NEIGHBOURS):
            yield _draw(self.op, self.dtype, self.layout, self.only, draw.seed, _each(moved, draw.args), False)


def yardstick(
    op: Op,
    cases: ModuleType,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    layout: Layout = lambda tensor: tensor,
    only: int | None = None,
    **variant: Any,
) -> Yardstick:
    """The reference run on inputs of `shape`.

    `layout` turns each input and gradient into one with the same values and other strides; `only` lets the gradient
    arrive at that one of the op's results alone. A small shape is drawn several times, and the reference further on its
    own until it has erred on SAMPLES elements of each result, so that those on which it happens to be exact do not set
    the rule.
    """
    draws: list[Draw] = []
    elements = sum(shape) if isinstance(op, ListOp) else torch.Size(shape).numel()
    for seed in range(DRAWS):
        args = _each(layout, cases.inputs(shape, dtype, device, seed, **variant))
        tried = seed == 0 or (seed + 1) * elements <= TRIED
        draws.append(_draw(op, dtype, layout, only, seed, args, tried))
        smallest = min(true.numel() for true in draws[-1].truth.values())
        if smallest >= PLENTY or (not tried and smallest * seed >= SAMPLES):
            break
    return Yardstick(op, dtype, layout, only, draws)


def _draw(op: Op, dtype: torch.dtype, layout: Layout, only: int | None, seed: int, args: tuple, tried: bool) -> Draw:
    plain: Layout = lambda tensor: layout(tensor).contiguous()  # noqa: E731
    same = dict(run(op, "reference", args, seed, dtype, plain, only))
    truth = dict(run(op, "reference", _wide(args), seed, dtype, plain, only))
    return Draw(seed, args, tried, same, truth)


def verify(
    op: Op, cases: ModuleType, implementation: str, shape: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> list[Verdict]:
    """Verdicts on `implementation` in the case that `yardstick` makes of the rest."""
    return yardstick(op, cases, shape, dtype, **options).verdicts(implementation)


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
    if isinstance(op, InPlaceOp):
        yield from _run_in_place(op, implementation, args, layout)
        return
    args = leaves(op, args)
    given_here = [i for i in op.differentiable if args[i] is not None]
    tensors = [args[i] for i in given_here]
    names = [f"d{op.forward_schema.names[i]}" for i in given_here]
    with use(**{op.name: implementation}):
        results = op(*args)
        results = results if isinstance(results, tuple) else (results,)
        yield from zip(op.forward_schema.results, (result.detach() for result in results), strict=False)
        if op.backward_schema is None:
            return
        arriving = [(i, result) for i, result in enumerate(results) if only in (None, i)]
        given = [
            layout(random(1000 + seed + i, "cpu", (tuple(result.shape), dtype))[0].to(result.device, result.dtype))
            for i, result in arriving
        ]
        gradients = torch.autograd.grad([result for _, result in arriving], tensors, given)
    yield from zip(names, gradients, strict=True)


def _run_in_place(
    op: InPlaceOp, implementation: str, args: tuple, layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the result, then of what is written, a list as one vector. `args` stay as they are."""
    args = _each(lambda tensor: layout(tensor.clone()), args)
    with use(**{op.name: implementation}):
        result = op(*args)
    if result is not None:
        yield op.forward_schema.results[0], result
    for i in op.written:
        if isinstance(args[i], torch.Tensor):
            yield op.forward_schema.names[i], args[i]
        elif args[i]:
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
    dtype = triples[0][1].dtype
    errors, references, special = [0.0], [0.0], True
    for ours, same, true in (block for triple in triples for block in _blocks(triple)):
        finite = true.isfinite() & same.isfinite()
        references.append(_largest((same - true).abs()[finite]))
        if ours is None:
            continue
        error = (ours - true).abs()
        if dtype.is_floating_point:
            special = special and bool(((ours.isnan() == same.isnan()) & (ours.isinf() == same.isinf())).all())
            info = torch.finfo(dtype)
            error -= info.eps / 2 * true.abs() + info.smallest_normal * info.eps
        errors.append(_largest(error[finite]))
    largest = torch.tensor(errors, dtype=torch.float64).max().item()  # NaN if one is
    if not dtype.is_floating_point:
        return Verdict(name, largest, 1.0, True)
    return Verdict(name, largest, (3 if name.startswith("d") else 2) * max(references), special)


def _blocks(triple: Triple) -> Iterator[Triple]:
    """The tensors flat and in float64, a cacheful at a time."""
    ours, same, true = (None if tensor is None else tensor.flatten() for tensor in triple)
    assert same is not None and true is not None
    for start in range(0, len(same), BLOCK):
        yield None if ours is None else _block(ours, start), _block(same, start), _block(true, start)


def _block(flat: torch.Tensor, start: int) -> torch.Tensor:
    return flat[start : start + BLOCK].cpu().double()


def _largest(values: torch.Tensor) -> float:
    return values.max().item() if values.numel() else 0.0
