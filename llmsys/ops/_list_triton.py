"""What the Triton kernels over lists of tensors share: one launch for many tensors, whose addresses a program reads
from a table, and an optimizer's step of one block.

A table is (rows, num_tensors) int64: first program, elements, then one row of addresses for each list.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import triton
import triton.language as tl

from llmsys.ops._flat import Tensors, flat
from llmsys.ops._stochastic import first_elements
from llmsys.ops._triton import device_of, load, seed_words, store, store_stochastic

BLOCK = 2048
WARPS = 8  # 8 elements per thread: a block on the unvectorised path holds one address per element
MAX_TENSORS = 1024  # per launch: every program reads one number of each to find its tensor
TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def find_block(table_ptr, num_tensors, TENSORS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's tensor, as its number in the table, and where in it the program's block starts."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TENSORS)
    first_programs = tl.load(table_ptr + index, mask=index < num_tensors, other=1 << 62)
    tensor = tl.sum((first_programs <= program).to(tl.int32), axis=0) - 1
    return tensor, (program - tl.load(table_ptr + tensor)) * BLOCK


@triton.jit
def at(address, dtype: tl.constexpr, offset, ALIGNED: tl.constexpr):
    """Pointers to the elements `offset` of what lies at `address`, a multiple of 16 bytes if ALIGNED. The promise is
    lost on a pointer that was made elsewhere, and on one that both branches use it would hold for both."""
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offset


@triton.jit
def addresses_of(column_ptr, num_tensors, STATES: tl.constexpr, MASTER: tl.constexpr):
    """Of param, grad, two states and the master; where there is none, that of param."""
    param = tl.load(column_ptr + 2 * num_tensors)
    grad = tl.load(column_ptr + 3 * num_tensors)
    first_state, second_state, master = param, param, param
    if STATES > 0:
        first_state = tl.load(column_ptr + 4 * num_tensors)
    if STATES > 1:
        second_state = tl.load(column_ptr + 5 * num_tensors)
    if MASTER:
        master = tl.load(column_ptr + (4 + STATES) * num_tensors)
    return param, grad, first_state, second_state, master


@triton.jit
def is_whole(addresses, start, numel, BLOCK: tl.constexpr):
    """A full block at addresses that are multiples of 16 bytes: it takes vector accesses, which the compiler must be
    promised."""
    param, grad, first_state, second_state, master = addresses
    return (start + BLOCK <= numel) & ((param | grad | first_state | second_state | master) % 16 == 0)


@triton.jit
def pointers_of(
    addresses, start, numel, PARAM: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """To the block's elements, in the order of `addresses`, and the mask of those that there are."""
    param, grad, first_state, second_state, master = addresses
    offset = start + tl.arange(0, BLOCK)
    return (
        at(param, PARAM, offset, WHOLE),
        at(grad, GRAD, offset, WHOLE),
        at(first_state, tl.float32, offset, WHOLE),
        at(second_state, tl.float32, offset, WHOLE),
        at(master, tl.float32, offset, WHOLE),
        tl.full((BLOCK,), True, tl.int1) if WHOLE else offset < numel,
    )


@triton.jit
def load_grad(grad_ptr, mask, grad_scale_ptr, MAXIMIZE: tl.constexpr):
    grad = load(grad_ptr, mask)
    if grad_scale_ptr is not None:
        grad *= tl.load(grad_scale_ptr)
    if MAXIMIZE:
        grad = -grad
    return grad


@triton.jit
def step_elements(
    STEP: tl.constexpr,
    settings,
    addresses,
    start,
    numel,
    seed_low,
    seed_high,
    first,
    grad_scale_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATES: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    KEEP_STATES: tl.constexpr,
):
    pointers = pointers_of(addresses, start, numel, PARAM, GRAD, BLOCK, WHOLE)
    param_ptr, grad_ptr, first_ptr, second_ptr, master_ptr, mask = pointers
    g = load_grad(grad_ptr, mask, grad_scale_ptr, MAXIMIZE)
    m = load(first_ptr, mask) if STATES > 0 else g
    v = load(second_ptr, mask) if STATES > 1 else g
    p = load(master_ptr, mask) if MASTER else load(param_ptr, mask)
    p, m, v = STEP(p, g, m, v, settings)
    if STATES > 0 and not KEEP_STATES:
        store(first_ptr, m, mask)
    if STATES > 1 and not KEEP_STATES:
        store(second_ptr, v, mask)
    if MASTER:
        store(master_ptr, p, mask)
    if STOCHASTIC:
        store_stochastic(param_ptr, p, seed_low, seed_high, first, mask, BLOCK)
    else:
        store(param_ptr, p, mask)


@triton.jit
def step_block(
    STEP: tl.constexpr,
    settings,
    tensor,
    start,
    table_ptr,
    num_tensors,
    seed_low,
    seed_high,
    grad_scale_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATES: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_STATES: tl.constexpr = False,
):
    """(p, m, v) = STEP(p, g, m, v, settings) on one block, where m and v are the states, or nothing to rely on."""
    column_ptr = table_ptr + tensor
    numel = tl.load(column_ptr + num_tensors)
    addresses = addresses_of(column_ptr, num_tensors, STATES, MASTER)
    first = start
    if STOCHASTIC:  # in the place of a master, as there is none
        first += tl.load(column_ptr + (4 + STATES) * num_tensors)
    if is_whole(addresses, start, numel, BLOCK):
        step_elements(
            STEP, settings, addresses, start, numel, seed_low, seed_high, first, grad_scale_ptr,
            PARAM, GRAD, STATES, MASTER, STOCHASTIC, MAXIMIZE, BLOCK, True, KEEP_STATES,
        )  # fmt: skip
    else:
        step_elements(
            STEP, settings, addresses, start, numel, seed_low, seed_high, first, grad_scale_ptr,
            PARAM, GRAD, STATES, MASTER, STOCHASTIC, MAXIMIZE, BLOCK, False, KEEP_STATES,
        )  # fmt: skip


def tables(lists: list[Tensors], *rows: list[int], block: int = BLOCK) -> Iterator[tuple[torch.Tensor, list[int], int]]:
    """For each launch: its table, to which `rows` are added; the programs of each tensor; all of them."""
    device = lists[0][0].device
    for begin in range(0, len(lists[0]), MAX_TENSORS):
        columns = [tensors[begin : begin + MAX_TENSORS] for tensors in lists]
        numels = [x.numel() for x in columns[0]]
        programs = [triton.cdiv(numel, block) for numel in numels]
        *firsts, total = accumulate(programs, initial=0)
        if total == 0:
            continue
        addresses = ([x.data_ptr() for x in column] for column in columns)
        added = (row[begin : begin + MAX_TENSORS] for row in rows)
        table = torch.tensor([firsts, numels, *addresses, *added], dtype=torch.int64)
        if device.type == "cuda":  # pinned, so that the copy does not wait for the device
            table = table.pin_memory().to(device, non_blocking=True)
        yield table, programs, total


def step_launches(
    params: Tensors,
    grads: Tensors,
    states: list[Tensors],
    masters: Tensors,
    stochastic_rounding: int | None,
    *,
    row_major: bool = False,
) -> Iterator[tuple[int, tuple, tuple]]:
    """For each launch of an optimizer's kernel: its programs, its first arguments (table, number of tensors and the two
    halves of the seed) and the first of its constants (PARAM, GRAD, MASTER, STOCHASTIC and TENSORS).
    """
    stochastic = stochastic_rounding is not None
    seeds = seed_words(stochastic_rounding or 0)
    with flat([params, *states, masters], [grads], row_major=row_major or stochastic) as lists, device_of(params[0]):
        *written, gs = lists
        ps, *kept = (tensors for tensors in written if tensors)
        for table, programs, total in tables([ps, gs, *kept], *[first_elements(params)] * stochastic):
            dtypes = TL_DTYPE[params[0].dtype], TL_DTYPE[grads[0].dtype]
            tensors = len(programs)
            constants = *dtypes, bool(masters), stochastic, triton.next_power_of_2(tensors)
            yield total, (table, tensors, *seeds), constants
