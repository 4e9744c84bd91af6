"""Every check that every op must pass, for each implementation by name: `checks(OP, cases)`.

@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from unittest import mock

import pytest
import torch

from llmsys import _C, env
from llmsys.ops._cases import random
from llmsys.ops._native import ISAS, instruction_set
from llmsys.ops._op import Op, use
from llmsys.ops._verify import leaves, run, verify
from tests import avx512, simt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXECUTED: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Runner:
    """An implementation by name, in one of the ways that this machine can run it."""

    name: str  # "cpu[avx2]"
    implementation: str  # "cpu"
    why_not: str | None = None
    isa: str | None = None

    @property
    def device(self) -> str:
        """Where its tensors are: without a GPU, Triton is interpreted on the CPU's."""
        return "cuda" if self.implementation in ("cuda", "triton") and torch.cuda.is_available() else "cpu"

    @property
    def slow(self) -> bool:
        """Triton's interpreter takes milliseconds for each program: it gets fewer shapes, and float16 once."""
        return self.implementation == "triton" and env.triton_interpreted()

    def selected(self) -> AbstractContextManager[None]:
        """A block in which CPU kernels run on this runner's instruction set."""
        return instruction_set(self.isa or _C.cpu.isa())


@dataclass(frozen=True)
class Check:
    """One named check of one runner in one dtype."""

    op: Op
    runner: Runner
    dtype: torch.dtype
    kind: str
    body: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.runner.name}-{str(self.dtype).removeprefix('torch.')}-{self.kind}"

    def __call__(self) -> None:
        key = (self.op.name, self.runner.name)
        if self.runner.why_not:
            EXECUTED[key] = f"not executed: {self.runner.why_not}"
            pytest.skip(self.runner.why_not)
        implementation = self.op.implementations[self.runner.implementation]
        if reason := implementation.reason(self.runner.device, _example(self.op, self.dtype)):
            pytest.skip(reason)
        with self.runner.selected():
            self.body()
        EXECUTED[key] = "executed"


def runners(op: Op) -> list[Runner]:
    """Every implementation of `op`, the CPU's once per instruction set, AVX-512 emulated, and the CUDA source
    on the SIMT simulator.
    """
    avx512.register(op)
    simt.register(op)
    found = []
    for name, implementation in op.implementations.items():
        if name == "cpu":
            for isa in ISAS:
                missing = None if isa in _C.cpu.isas() else f"this machine cannot run {isa}"
                found.append(Runner(f"cpu[{isa}]", name, missing, isa))
        else:
            runner = Runner(name, name)
            found.append(replace(runner, why_not=implementation.reason(runner.device, _example(op))))
    return found


def checks(op: Op, cases: ModuleType) -> list[Check]:
    """All checks of `op`, for pytest.mark.parametrize."""
    found = []
    for runner in runners(op):
        for dtype in DTYPES:
            for kind, body in _KINDS.items():
                if kind == "partial_gradients" and not op.backward_schema:
                    continue
                if runner.slow and dtype == torch.float16 and kind != "accurate":
                    continue
                found.append(Check(op, runner, dtype, kind, partial(body, op, cases, runner, dtype)))
    reference = Runner("reference", "reference")
    for kind, body in _ONCE.items():
        if kind == "gradcheck" and not op.backward_schema:
            continue
        found.append(Check(op, reference, torch.float64, kind, partial(body, op, cases)))
    return found


# ---- layouts: the same values, other strides ----


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous()


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """Rows with a gap after each: one stride fits."""
    if tensor.dim() < 2:
        return tensor
    gap = float("nan") if tensor.is_floating_point() else tensor.dtype == torch.bool or torch.iinfo(tensor.dtype).max
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), gap, dtype=tensor.dtype, device=tensor.device)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Elements of a row apart in memory: nothing fits but a copy."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def offset(tensor: torch.Tensor) -> torch.Tensor:
    """One element past an aligned address."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    view = flat[1:].view(tensor.shape)
    return view.copy_(tensor)


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """Every row the first: stride 0."""
    if tensor.dim() < 2 or not tensor.numel():
        return tensor
    return tensor[(slice(0, 1),) * (tensor.dim() - 1)].expand(tensor.shape)


# Layouts of (B, T, H, K) that attention has; other tensors stay as they are.


def heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, T, K) in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor


def fused_projection(tensor: torch.Tensor) -> torch.Tensor:
    """The middle third of a (B, T, 3, H, K) projection of q, k and v."""
    if tensor.dim() != 4:
        return tensor
    gap = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    projected = tensor.new_full((*tensor.shape[:2], 3, *tensor.shape[2:]), gap)
    projected[:, :, 1] = tensor
    return projected[:, :, 1]


LAYOUTS = {"gapped": gapped, "transposed": transposed, "offset": offset, "expanded": expanded}


# ---- checks of each runner and dtype ----


def _accurate(op: Op, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    for variant in cases.VARIANTS:
        for shape in cases.SMALL if not variant else cases.SMALL[-1 if runner.slow else -3 :]:
            _right(op, cases, runner, shape, dtype, **variant)


def _any_layout(op: Op, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    for layout in LAYOUTS.values():
        for shape in shapes(cases, (3, 7), (5, 16), (2, 3, 15), (4, 3, 33))[-1 if runner.slow else 0 :]:
            _right(op, cases, runner, shape, dtype, layout=layout)


def _partial_gradients(op: Op, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """Gradients that arrive at one of several results."""
    (shape,) = shapes(cases, (5, 33))
    for only in range(op.num_public):
        _right(op, cases, runner, shape, dtype, only=only)


def _stays_inside(op: Op, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """Nothing outside a buffer is written, all of each output is, and inputs stay as they were."""
    for shape in shapes(cases, (1, 1), (3, 7), (5, 16), (4, 33), (70, 5)):
        args = cases.inputs(shape, dtype, runner.device)
        before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        plain = list(run(op, runner.implementation, args, 0, dtype))
        with guarded_allocations():
            guarded = list(run(op, runner.implementation, args, 0, dtype))
        for (name, result), (_, expected) in zip(guarded, plain, strict=True):
            assert same_bits(result, expected), f"{name} at {shape} changes when its buffer starts as NaN"
        for arg, was in zip(args, before, strict=True):
            assert not isinstance(arg, torch.Tensor) or same_bits(arg, was), f"an input was written at {shape}"


def _writes_out(op: Op, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """out= receives what would have been returned, without a gradient."""
    (shape,) = shapes(cases, (5, 33))
    args = cases.inputs(shape, dtype, runner.device)
    with use(**{op.name: runner.implementation}), torch.no_grad():
        expected = op(*args)
        many = isinstance(expected, tuple)
        out = tuple(torch.full_like(t, float("nan")) for t in (expected if many else (expected,)))
        result = op(*args, out=out if many else out[0])
    for given, returned, wanted in zip(
        out, result if many else (result,), expected if many else (expected,), strict=True
    ):
        assert returned.data_ptr() == given.data_ptr()
        assert same_bits(given, wanted)


def _keeps_special_values(op: Op, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """NaN and infinities in tensors of the case's shape come out where the reference has them."""
    (shape,) = shapes(cases, (7, 33))

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if tensor.shape == shape:
            for row, value in enumerate((float("nan"), float("inf"), float("-inf"), torch.finfo(dtype).max, 0.0)):
                tensor.view(-1, shape[-1])[row, 3] = value
        return tensor

    _right(op, cases, runner, shape, dtype, layout=poisoned)


def _repeats(op: Op, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """The same bits on a second run, and with another number of threads."""
    (shape,) = shapes(cases, (9, 264) if runner.slow else (130, 264))
    args = cases.inputs(shape, dtype, runner.device)
    first = list(run(op, runner.implementation, args, 0, dtype))
    threads = torch.get_num_threads()
    try:
        # PyTorch promises less, and the interpreter has no threads.
        one = runner.implementation == "reference" or runner.slow
        for count in (threads,) if one else (threads, 1, 3):
            torch.set_num_threads(count)
            for (name, a), (_, b) in zip(first, run(op, runner.implementation, args, 0, dtype), strict=True):
                assert same_bits(a, b), f"{name} differs with {count} threads"
    finally:
        torch.set_num_threads(threads)


_KINDS = {
    "accurate": _accurate,
    "any_layout": _any_layout,
    "partial_gradients": _partial_gradients,
    "stays_inside": _stays_inside,
    "writes_out": _writes_out,
    "special_values": _keeps_special_values,
    "repeats": _repeats,
}


# ---- checks once per op ----


def _gradcheck(op: Op, cases: ModuleType) -> None:
    """The reference's gradient, and its gradient's, against finite differences."""
    (shape,) = shapes(cases, (2, 5))
    args = leaves(op, cases.inputs(shape, torch.float64))
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def _opcheck(op: Op, cases: ModuleType) -> None:
    """Schema, fake tensors, autograd registration and tracing of the torch.library node."""
    (shape,) = shapes(cases, (4, 9))
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (contiguous, transposed):
            args = [layout(arg) if isinstance(arg, torch.Tensor) else arg for arg in cases.inputs(shape, dtype)]
            torch.library.opcheck(op.node, leaves(op, tuple(args)))


def _compiles(op: Op, cases: ModuleType) -> None:
    """torch.compile(fullgraph=True) gives the eager results and gradients, for a second shape too."""
    torch.compiler.reset()  # this lambda is one piece of code for all ops, and may be compiled eight times
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=True)
    for shape in shapes(cases, (4, 33), (6, 17)):
        outcomes = []
        for function in (op, compiled):
            args = leaves(op, cases.inputs(shape, torch.float32))
            results = function(*args)
            results = results if isinstance(results, tuple) else (results,)
            tensors = [args[i] for i in op.differentiable if args[i] is not None]
            given = [random(i, "cpu", (tuple(r.shape), r.dtype))[0] for i, r in enumerate(results)]
            gradients = torch.autograd.grad(results, tensors, given) if tensors else ()
            outcomes.append([*results, *gradients])
        for eager, traced in zip(*outcomes, strict=True):
            assert same_bits(eager, traced)


_ONCE = {"gradcheck": _gradcheck, "opcheck": _opcheck, "compiles": _compiles}


# ---- pieces ----


def shapes(cases: ModuleType, *sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """`sizes`, each (…, D), as the op's own shapes: `cases.shape` says which, of an op whose inputs are not (…, D)."""
    return [cases.shape(*size) for size in sizes] if hasattr(cases, "shape") else list(sizes)


def _right(op: Op, cases: ModuleType, runner: Runner, shape: tuple, dtype: torch.dtype, **options: object) -> None:
    for verdict in verify(op, cases, runner.implementation, shape, dtype, device=runner.device, **options):
        assert verdict.right, f"{op.name} {runner.name} {shape} {dtype} {options}: {verdict}"


def _example(op: Op, dtype: torch.dtype = torch.bfloat16) -> tuple:
    one = torch.ones(1, 1, dtype=dtype)
    return tuple(one if a.type.startswith("Tensor") else a.default for a in op.forward_schema.arguments)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal element for element, NaN where NaN."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


GUARD = 64  # elements before and after each buffer


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Inside, uninitialised tensors start as NaN, fenced by sentinels that must survive."""
    buffers: list[torch.Tensor] = []
    empty = torch.empty

    def fenced(shape: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape).numel()
        start = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        buffer = empty(size + 2 * GUARD, dtype=dtype, device=device).fill_(start)
        buffer[:GUARD] = buffer[GUARD + size :] = 77.0
        buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(shape)

    def fenced_empty(*shape: object, dtype: torch.dtype | None = None, device: object = None, **options: object):
        assert not options, f"torch.empty with {options} in a kernel's Python"
        sizes = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        return fenced(tuple(sizes), dtype or torch.get_default_dtype(), device or "cpu")

    def fenced_like(tensor: torch.Tensor, *, dtype: torch.dtype | None = None, **options: object) -> torch.Tensor:
        return fenced(tuple(tensor.shape), dtype or tensor.dtype, tensor.device)

    with mock.patch.multiple(torch, empty=fenced_empty, empty_like=fenced_like):
        yield
    for buffer in buffers:
        assert (buffer[:GUARD] == 77).all() and (buffer[-GUARD:] == 77).all(), "a kernel wrote outside its buffer"


__all__ = ["EXECUTED", "Check", "Runner", "checks", "guarded_allocations", "runners", "same_bits"]
