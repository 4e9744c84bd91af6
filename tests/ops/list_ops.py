"""What the tests of ops over lists of tensors share, and what every optimizer's step must pass: `checks(OP, cases)`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import pytest
import torch

from llmsys.ops._op import ListOp, use
from llmsys.ops._verify import verify
from tests import harness
from tests.harness import DTYPES, EXECUTED, Check, Runner, runners, same_bits

GUARD = 64  # elements before and after each buffer


def every_runner(op: ListOp):
    """The fixture `runner`: each implementation of `op` by name, the CPU's once per instruction set, selected."""

    @pytest.fixture(params=runners(op), ids=lambda runner: runner.name)
    def runner(request) -> Iterator[Runner]:
        key = (op.name, request.param.name)
        if request.param.why_not:
            EXECUTED[key] = f"not executed: {request.param.why_not}"
            pytest.skip(request.param.why_not)
        with request.param.selected():
            yield request.param
        EXECUTED[key] = "executed"

    return runner


def assert_right(op: ListOp, cases, runner: Runner, shape: tuple, dtype: torch.dtype, **options) -> None:
    """By the rule of `llmsys.ops._verify`."""
    for verdict in verify(op, cases, runner.implementation, shape, dtype, device=runner.device, **options):
        assert verdict.right, f"{runner.name} {shape} {dtype} {options}: {verdict}"


def call(op: ListOp, runner: Runner, args: tuple):
    with use(**{op.name: runner.implementation}):
        return op(*args)


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy one element past an aligned address, between sentinels."""
    buffer = tensor.new_full((tensor.numel() + 2 * GUARD + 1,), 77.0)
    return buffer[GUARD + 1 : GUARD + 1 + tensor.numel()].view(tensor.shape).copy_(tensor)


def assert_fences_stand(tensor: torch.Tensor) -> None:
    buffer = tensor.new_empty(0).set_(tensor.untyped_storage())
    start = tensor.storage_offset()
    assert (buffer[:start] == 77).all() and (buffer[start + tensor.numel() :] == 77).all()


def copied(args: tuple) -> tuple:
    """`args` with every tensor cloned."""
    return mapped(torch.Tensor.clone, args)


def mapped(change, args: tuple) -> tuple:
    """`args` with every tensor in a list changed."""
    return tuple([change(tensor) for tensor in arg] if isinstance(arg, list) else arg for arg in args)


def tensors_of(args: tuple) -> list[torch.Tensor]:
    return [tensor for arg in args if isinstance(arg, list) for tensor in arg]


def assert_same_bits(first: tuple, second: tuple) -> None:
    for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
        assert same_bits(a, b)


# ---- checks of an optimizer's step, in place over lists of params, grads, states and masters ----


def checks(op: ListOp, cases: ModuleType) -> list[Check]:
    """All checks of `op`, for pytest.mark.parametrize."""
    found = [
        Check(op, runner, dtype, kind, partial(body, op, cases, runner, dtype))
        for runner in runners(op)
        for dtype in DTYPES
        for kind, body in _KINDS.items()
        if not (runner.slow and dtype == torch.float16 and body is not _accurate)
    ]
    reference = Runner("reference", "reference")
    return found + [Check(op, reference, torch.float64, kind, partial(body, op, cases)) for kind, body in _ONCE.items()]


def _accurate(op: ListOp, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """In every variant that the implementation does not refuse, as CUDA's refuses stochastic rounding."""
    for variant in cases.VARIANTS:
        if op.implementations[runner.implementation].why_not(*cases.inputs((1,), dtype, runner.device, **variant)):
            continue
        for shape in cases.SMALL if not variant else cases.SMALL[-1 if runner.slow else -2 :]:
            assert_right(op, cases, runner, shape, dtype, **variant)


def _offset_by_one_element_and_nothing_outside_is_written(
    op: ListOp, cases: ModuleType, runner: Runner, dtype: torch.dtype
) -> None:
    args = cases.inputs((0, 1, 7, 15, 16, 17, 33, 1000), dtype, runner.device, masters=True)
    expected, guarded = copied(args), mapped(fenced, args)
    call(op, runner, expected)
    call(op, runner, guarded)
    assert_same_bits(guarded, expected)
    read = tuple(arg for i, arg in enumerate(args) if i not in op.written)
    assert_same_bits(tuple(arg for i, arg in enumerate(guarded) if i not in op.written), read)
    for tensor in tensors_of(guarded):
        assert_fences_stand(tensor)


def _any_layout(op: ListOp, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """Where tensors have gaps, are transposed, or the one in one list and the other in the next: written in place."""
    args = mapped(lambda tensor: tensor.view(-1, 3), cases.inputs((3, 21, 48), dtype, runner.device, masters=True))
    expected = copied(args)
    call(op, runner, expected)
    gapped, transposed = harness.gapped, harness.transposed
    for layouts in ((gapped, gapped), (transposed, transposed), (transposed, gapped)):
        strided = tuple(
            [layouts[i % 2](tensor.clone()) for tensor in arg] if isinstance(arg, list) else arg
            for i, arg in enumerate(args)
        )
        pointers = [tensor.data_ptr() for tensor in tensors_of(strided)]
        call(op, runner, strided)
        assert_same_bits(strided, expected)
        assert pointers == [tensor.data_ptr() for tensor in tensors_of(strided)]


def _special_values(op: ListOp, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    """NaN and infinities of each list in turn come out where the reference has them."""
    values = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max, 0.0, -0.0])
    args = cases.inputs((40, 9), dtype, runner.device, masters=True)
    for which in [i for i, arg in enumerate(args) if isinstance(arg, list)]:
        poisoned = copied(args)
        for tensor in poisoned[which]:
            tensor[:6] = values.to(tensor)
        expected = copied(poisoned)
        call(op, runner, poisoned)
        op.implementations["reference"].forward(*expected)
        for a, b in zip(tensors_of(poisoned), tensors_of(expected), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), f"list {which}"


def _same_bits_again_and_with_other_threads(op: ListOp, cases: ModuleType, runner: Runner, dtype: torch.dtype) -> None:
    many = range(300 if runner.implementation == "cpu" else 3)  # an interpreter needs seconds for many
    args = cases.inputs((30_000 // (10 if runner.slow else 1), 5, 0, 4096, *many), dtype, runner.device, masters=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (threads, threads, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(copied(args))
            call(op, runner, results[-1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0], other)


_KINDS = {
    body.__name__.removeprefix("_"): body
    for body in (
        _accurate,
        _offset_by_one_element_and_nothing_outside_is_written,
        _any_layout,
        _special_values,
        _same_bits_again_and_with_other_threads,
    )
}


def _float64_runs_the_reference(op: ListOp, cases: ModuleType) -> None:
    assert op.select(*cases.inputs((5, 3), torch.float64)).name == "reference"
    assert_right(op, cases, Runner("reference", "reference"), (5, 3), torch.float64)


def _opcheck(op: ListOp, cases: ModuleType) -> None:
    """Schema, fake tensors and tracing of the torch.library node."""
    for dtype in (torch.float32, torch.bfloat16):
        for variant in ({}, {"masters": True, "grad_scale": 0.5, "maximize": True}, {"stochastic_rounding": 7}):
            torch.library.opcheck(op.node, cases.inputs((5, 9), dtype, **variant))


_ONCE = {body.__name__.removeprefix("_"): body for body in (_float64_runs_the_reference, _opcheck)}
