"""The same bits over many runs, and for a row alone as among others."""

from importlib import import_module

import pytest
import torch

import llmsys
from llmsys.ops import _op
from llmsys.ops._op import InPlaceOp, ListOp
from llmsys.ops._verify import run
from tests.harness import same_bits, shapes

OPS = [_op.get(name) for name in _op.names()]
RUNS = 100
# What a row is by itself: a place in the sequence of random numbers; a row of a table, whose gradient is another's.
NOT_BY_ROWS = {"dropout": "a row's mask depends on its place", "embedding": "its rows are looked up, not computed"}
BY_ROWS = {"linear_cross_entropy": {"reduced": False}}  # the variant with a result for each row


def cases_of(op):
    return import_module(f"llmsys.ops.{op.name}.cases")


def native(op):
    if "cpu" not in op.implementations:
        pytest.skip("it has no implementation named cpu")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_same_bits_over_many_runs(op):
    native(op)
    cases = cases_of(op)
    (shape,) = [cases.SMALL[-1]] if isinstance(op, ListOp) else shapes(cases, (70, 264))
    args = cases.inputs(shape, torch.bfloat16)
    first = list(run(op, "cpu", args, 0, torch.bfloat16))
    for _ in range(RUNS):
        for (name, a), (_, b) in zip(first, run(op, "cpu", args, 0, torch.bfloat16), strict=True):
            assert same_bits(a, b), name


def results(op, args):
    """What the op gives, or writes into its arguments."""
    with llmsys.use(**{op.name: "cpu"}), torch.no_grad():
        found = op(*args)
    if isinstance(op, InPlaceOp):
        return [args[i] for i in op.written if args[i] is not None]
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("op", [op for op in OPS if not isinstance(op, ListOp)], ids=lambda op: op.name)
def test_a_row_alone_as_among_others(op):
    native(op)
    if op.name in NOT_BY_ROWS:
        pytest.skip(NOT_BY_ROWS[op.name])
    cases = cases_of(op)
    for dtype in (torch.float32, torch.bfloat16):
        (shape,) = shapes(cases, (37, 129))
        args = cases.inputs(shape, dtype, **BY_ROWS.get(op.name, {}))
        rows = shape[0]

        def alone(value, rows=rows):
            by_row = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows
            return value[5:6].clone() if by_row else value

        whole, single = (results(op, given) for given in (args, tuple(map(alone, args))))
        pairs = [(a, b) for a, b in zip(whole, single, strict=True) if a.shape[:1] == (rows,)]
        assert pairs
        for among, by_itself in pairs:
            assert same_bits(by_itself, alone(among)), f"{op.name} {dtype}"
