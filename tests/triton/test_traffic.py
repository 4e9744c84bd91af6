"""The bytes that each Triton kernel moves, counted at its loads and stores, are those that the case says must move."""

from contextlib import contextmanager
from importlib import import_module

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
interpreter = pytest.importorskip("triton.runtime.interpreter")

from benchmarks.gate import copied, tensors  # noqa: E402
from benchmarks.harness import backward_args  # noqa: E402
from llmsys import env  # noqa: E402
from llmsys.ops import _op  # noqa: E402
from llmsys.ops._op import ListOp  # noqa: E402

if not env.triton_interpreted():
    pytest.skip("loads and stores are counted in Triton's interpreter", allow_module_level=True)

OPS = [op for op in map(_op.get, _op.names()) if "triton" in op.implementations]
PRODUCTS = ("attention", "linear", "linear_cross_entropy")  # tiles of matrices are read again and again
# How often a kernel may read an element of a large input, where that is not once.
READS = {
    "embedding": 64,  # a row as often as it is looked up
    "group_norm": 3,  # a group that registers do not hold: for its mean, its variance, and its result
    "lamb": 2,  # the second pass needs the lengths that the first has found; its case counts both
}
SMALL_SHARE = 0.02  # of the bytes: row statistics and the like, which a case may leave out
CALLS = [
    (op, direction)
    for op in OPS
    if op.name not in PRODUCTS
    for direction in (("forward",) if op.backward_schema is None else ("forward", "backward"))
]


class Count:
    """Addresses of every byte's element that kernels read and wrote."""

    def __init__(self):
        self.loads, self.stores = [], []

    @staticmethod
    def entry(pointers, mask):
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].ravel(), itemsize

    @staticmethod
    def distinct(entries):
        """Address → bytes there, and how often it was met."""
        if not entries:
            return np.empty(0, np.uint64), np.empty(0, int), np.empty(0, int)
        addresses = np.concatenate([a.astype(np.uint64) for a, _ in entries])
        sizes = np.concatenate([np.full(len(a), size) for a, size in entries])
        found, first, times = np.unique(addresses, return_index=True, return_counts=True)
        return found, sizes[first], times


@contextmanager
def counted(monkeypatch):
    count, builder = Count(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        count.loads.append(Count.entry(pointers, mask))
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        count.stores.append(Count.entry(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        yield count


def shape_of(op, cases):
    """Rows of a benchmark's width, few of them; of lists, enough that addresses are few beside elements."""
    if isinstance(op, ListOp):
        return (1 << 16, 1 << 12)
    *_, width = cases.LARGE[0]
    return cases.shape(64, 1024) if hasattr(cases, "shape") else (64, *cases.LARGE[0][1:-1], min(width, 2048))


@pytest.mark.parametrize("op, direction", CALLS, ids=lambda value: getattr(value, "name", value))
def test_bytes_moved(op, direction, monkeypatch):
    cases = import_module(f"llmsys.ops.{op.name}.cases")
    args = cases.inputs(shape_of(op, cases), torch.bfloat16)
    if op.name == "cross_entropy":
        args[1].clamp_(min=0)  # rows whose target is ignored are not read
    expected = cases.traffic(direction, *args)
    if direction == "backward":
        args = backward_args(op, args)
    args = copied(list(args)) if isinstance(op, ListOp) else args
    with counted(monkeypatch) as count:
        getattr(op.implementations["triton"], direction)(*args)
    loaded, load_sizes, times = Count.distinct(count.loads)
    stored, store_sizes, store_times = Count.distinct(count.stores)
    given = tensors(list(args))
    inside = np.isin(loaded, _addresses(given))  # the rest are tables of addresses, and what kernels leave for others
    if op.name == "lamb":  # its case counts what both passes need; the second loads gradients that a compiler drops
        load_sizes = np.where(np.isin(loaded, _addresses(args[1])), load_sizes, load_sizes * times)
    passed_on = np.isin(stored, loaded[~inside])
    moved = load_sizes[inside].sum() + store_sizes[~passed_on].sum()
    assert abs(moved - expected) <= SMALL_SHARE * expected, f"{moved} bytes, the case says {expected}"
    assert (store_times == 1).all(), "an element is written twice"
    for tensor in given:
        reads = times[np.isin(loaded, _addresses([tensor]))]
        if len(reads) and tensor.nbytes * 4 >= max(other.nbytes for other in given):
            assert reads.mean() <= READS.get(op.name, 1) + SMALL_SHARE


def _addresses(given):
    return np.concatenate(
        [
            tensor.data_ptr() + tensor.element_size() * np.arange(tensor.numel(), dtype=np.uint64)
            for tensor in given
            if tensor.is_contiguous()
        ]
    )
