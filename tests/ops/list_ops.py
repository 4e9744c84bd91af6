"""What the tests of ops over lists of tensors share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmsys.ops._op import ListOp, use
from llmsys.ops._verify import verify
from tests.harness import EXECUTED, Runner, runners, same_bits

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
