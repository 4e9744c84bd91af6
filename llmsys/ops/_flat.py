"""Lists of tensors as flat runs of memory, for kernels that take an address and a size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

Tensors = list[torch.Tensor]


@contextmanager
def flat(written: Sequence[Tensors], read: Sequence[Tensors], *, row_major: bool = False) -> Iterator[list[Tensors]]:
    """The lists, with their i-th tensors laid out alike and without gaps, or all contiguous for `row_major`. Where they
    are not, contiguous copies stand in for them, and what is in the copies of `written` at the end is copied back.
    """
    given = [*written, *read]
    if all(tensor.is_contiguous() for tensors in given for tensor in tensors):
        yield given
        return
    lists = [list(tensors) for tensors in given]
    for i in range(len(given[0])):
        if row_major or not same_layout([tensors[i] for tensors in given if tensors]):
            for tensors in lists:
                if tensors:
                    tensors[i] = tensors[i].contiguous()
    yield lists
    for tensors, originals in zip(lists, written, strict=False):
        for tensor, original in zip(tensors, originals, strict=True):
            if tensor is not original:
                original.copy_(tensor)


def dense(tensors: Tensors) -> Tensors:
    """The tensors without gaps or repeats, their elements in any order: contiguous copies where there are some."""
    return [tensor if tensor.is_contiguous() or same_layout([tensor]) else tensor.contiguous() for tensor in tensors]


def same_layout(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors of one shape lie in memory in one order and without gaps: a kernel may run over them flat."""
    strides, size = tensors[0].stride(), 1
    for stride, extent in sorted(zip(strides, tensors[0].shape, strict=True)):
        if extent != 1 and stride != size:
            return False
        size *= extent
    return all(tensor.stride() == strides for tensor in tensors)
