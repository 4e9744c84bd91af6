"""The gate before the clock: what is wrong gets no time."""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from types import ModuleType
from typing import Any

import torch

from llmsys.ops._native import instruction_set
from llmsys.ops._op import Op
from llmsys.ops._verify import Yardstick, yardstick


@cache
def fault_of(
    op: Op,
    cases: ModuleType,
    implementation: str,
    shape: tuple[int, ...],
    dtype: str,
    device: str = "cpu",
    isa: str | None = None,
    **variant: Any,
) -> str | None:
    """None when every result and gradient is right by the rule of the tests, else which is not, and by how much."""
    if implementation == "reference":  # the rule is made of it
        return None
    check = partial(_yardstick(op, cases, shape, dtype, device, **variant).verdicts, implementation)
    verdicts = under(isa, check)() if isa else check()
    return "; ".join(str(verdict) for verdict in verdicts if not verdict.right) or None


@lru_cache(maxsize=1)  # the implementations of one contest, one after the other
def _yardstick(op: Op, cases: ModuleType, shape: tuple[int, ...], dtype: str, device: str, **variant: Any) -> Yardstick:
    return yardstick(op, cases, shape, getattr(torch, dtype), device=device, **variant)


def fault_of_out(run: Callable, args: tuple, out: Any) -> str | None:
    """None when `run` writes into `out`, filled with NaN before, the same bits that it returns without."""
    for tensor in tensors(out):
        tensor.fill_(float("nan"))
    into, fresh = run(*args, out=out), run(*args)
    return None if same_bits(into, fresh) else "out= gets other bits than a fresh result"


def same_bits(some: Any, others: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(tensors(some), tensors(others), strict=True))


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors inside nested tuples and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (tuple, list)) else []


def copied(value: Any) -> Any:
    """A copy of nested tensors, in the same nest."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return type(value)(copied(item) for item in value) if isinstance(value, (tuple, list)) else value


def under(isa: str, run: Callable) -> Callable:
    """`run` with the CPU kernels of `isa`; the instruction set in use comes back after each call."""
    return instruction_set(isa)(run)
