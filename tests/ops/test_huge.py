"""Over 2³¹ elements, one op at a time: what no index of 32 bits reaches. Each needs the 5 to 25 GiB that stand with it:

pytest -m huge tests/ops/test_huge.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsys.ops._cases import random
from llmsys.ops._op import get
from llmsys.ops._verify import judge
from llmsys.ops.append_kv.reference import quantise

pytestmark = pytest.mark.huge

PERIOD = 1021  # rows, after which the data repeat: a prime, so that an index that wraps at 2³¹ or 2³² meets other rows
GIB = 1 << 30


def rows_of(dim: int) -> int:
    return 2**31 // dim + 5


def block(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return random(len(shape), "cpu", ((PERIOD, *shape), dtype))[0]


def repeat(block: torch.Tensor, rows: int) -> torch.Tensor:
    """`rows` rows, those of `block` over and over."""
    out = block.new_empty(rows, *block.shape[1:])
    for start in range(0, rows, PERIOD):
        out[start : start + PERIOD] = block[: rows - start]
    return out


def places(rows: int, dim: int) -> Iterator[slice]:
    """The first rows, those around elements 2³⁰ (in bfloat16, byte 2³¹) and 2³¹, the last."""
    for row in (2, 2**30 // dim, 2**31 // dim, rows - 2):
        yield slice(row - 2, row + 2)


def need(gib: float) -> None:
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(field[1]) for field in fields if field[0] == "MemAvailable:") * 1024 / GIB
    if available < gib + 2:
        pytest.skip(f"needs {gib} GiB of memory and 2 to spare, of which {available:.0f} are available")


vector = torch.linspace(0.5, 1.5, 8192)
D = 4099  # odd, so that rows begin at any alignment


def narrow(size: int) -> torch.Tensor:
    return vector[:size].bfloat16()


# op → (forward arguments of so many rows, elements of a row, GiB)
CASES: dict[str, tuple[Callable[[int], tuple], int, float]] = {
    "silu": (lambda n: (repeat(block(D), n),), D, 8),
    "relu2": (lambda n: (repeat(block(D), n),), D, 8),
    "gelu": (lambda n: (repeat(block(D), n), "none"), D, 8),
    "swiglu": (lambda n: (repeat(block(D), n),) * 2, D, 12),
    "rms_norm": (lambda n: (repeat(block(D), n), narrow(D), 1e-6, 0.0), D, 8),
    "layer_norm": (lambda n: (repeat(block(D), n), narrow(D), narrow(D), 1e-5), D, 8),
    "add_rms_norm": (lambda n: (*(repeat(block(D), n),) * 2, narrow(D), 1e-6, 0.0), D, 16),
    "l2_norm": (lambda n: (repeat(block(D), n), 1e-12), D, 8),
    "group_norm": (lambda n: (repeat(block(32, 128), n), 8, narrow(32), narrow(32), 1e-5), 4096, 8),
    "softmax": (lambda n: (repeat(block(D), n),), D, 12),
    "cross_entropy": (
        lambda n: (repeat(block(D), n), repeat(torch.arange(PERIOD), n), None, -100, 0.1, 1e-3, 0.0),
        *(D, 8),
    ),
    "dropout": (lambda n: (repeat(block(D), n), 0.3, 7, 0), D, 8),
    "rope": (lambda n: (repeat(block(1, 32, 128), n), vector[None, :64], vector[None, 64:128], False), 4096, 8),
    "linear": (lambda n: (repeat(block(D), n), block(D)[:3], narrow(3), None, None), D, 9),
}


def cut(values: dict, where: slice, rows: int, dim: int) -> dict:
    """Those of `rows` rows, as dropout numbers their elements."""
    found = {
        name: value[where] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
        for name, value in values.items()
    }
    return found | ({"offset": where.start * dim} if "offset" in found else {})


def wide(values: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


def results_of(names: tuple[str, ...], results: Any) -> dict:
    return dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))


def check(ours: dict, given: dict, reference: Callable, rows: int, dim: int) -> None:
    """Results of so many rows, in `places`, by the rule of `llmsys.ops._verify`; sums over rows by what periods add."""
    names = tuple(ours)
    ours = {name: tensor for name, tensor in ours.items() if tensor.numel()}
    summed = [name for name, tensor in ours.items() if tensor.shape[0] != rows]
    for where in places(rows, dim):
        here = cut(given, where, rows, dim)
        same, true = (results_of(names, reference(*values.values())) for values in (here, wide(here)))
        for name in ours.keys() - summed:
            verdict = judge(name, [(ours[name][where], same[name], true[name])])
            assert verdict.right, f"rows {where}: {verdict}"
    if summed:
        parts = (wide(cut(given, slice(count), rows, dim)) for count in (PERIOD, rows % PERIOD))
        whole, rest = (results_of(names, reference(*values.values())) for values in parts)
        for name in summed:
            true = rows // PERIOD * whole[name] + rest[name]
            # One rounding of the largest to bfloat16, and as much for the sum.
            assert (ours[name] - true).abs().max() <= true.abs().max() * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", CASES)
def test_rows(name):
    make, dim, gib = CASES[name]
    need(gib)
    op, rows = get(name), rows_of(dim)
    native, reference = op.implementations["cpu"], op.implementations["reference"]
    args = dict(zip(op.forward_schema.names, make(rows), strict=True))
    x = next(iter(args.values()))
    assert x.numel() > 2**31
    results = results_of(op.forward_schema.results, native.forward(*args.values()))
    check(results, args, reference.forward, rows, dim)

    backward = op.backward_schema
    known: dict[str, Any] = {argument: True for argument in backward.names if argument.startswith("needs_")}
    known |= {**args, **results}
    for result, tensor in results.items():
        # What arrives at a result like x is x, which takes no more memory.
        arriving = x if tensor.shape == x.shape else repeat(block(*tensor.shape[1:], dtype=tensor.dtype), rows)
        known[f"d{result}"] = arriving
    given = {argument: known[argument] for argument in backward.names}
    del results, known, args, tensor
    check(results_of(backward.results, native.backward(*given.values())), given, reference.backward, rows, dim)


def test_embedding_of_many_ids():
    need(4.5)
    op = get("embedding")
    table, ids = block(D), repeat(torch.arange(PERIOD).flip(0), rows_of(D))
    y = op.implementations["cpu"].forward(table, ids, None)
    for where in places(len(ids), D):
        assert torch.equal(y[where], table[ids[where]])


def test_embedding_of_a_large_table():
    """Reads the last rows, and writes a gradient that is zero but there."""
    need(9)
    op, rows = get("embedding"), rows_of(D)
    table = repeat(block(D), rows)
    ids = torch.tensor([0, rows - 1, 2**31 // D, rows - 2, 2**30 // D, rows - 1])
    native = op.implementations["cpu"]
    assert torch.equal(native.forward(table, ids, None), table[ids])
    dy = block(D)[: len(ids)]
    dweight = native.backward(dy, table, ids, None)
    expected = torch.zeros(rows, dtype=torch.bool)
    expected[ids] = True
    for start in range(0, rows, 1 << 14):
        written = dweight[start : start + (1 << 14)].abs().amax(1) > 0
        assert torch.equal(written, expected[start : start + (1 << 14)])
    assert torch.equal(dweight[ids[2:5]], dy[2:5])
    assert torch.equal(dweight[rows - 1], (dy[1].float() + dy[5].float()).bfloat16())


COUNT = 2**31 + 1000 * 256 + 7
BLOCK = 256  # elements that share a scale in adamw_8bit
SCALARS = {"lr": 0.05, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 10}
OFF = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
NONE = {"grad_scale": None, "stochastic_rounding": None}
FLAT = {"params": torch.bfloat16, "grads": torch.bfloat16}
MOMENTS = {"exp_avgs": torch.float32, "exp_avg_sqs": torch.float32}
CODES = {"exp_avgs": torch.uint8, "exp_avg_sqs": torch.uint8}
SCALES = {"exp_avg_scales": torch.float32, "exp_avg_sq_scales": torch.float32}
OPTIMIZERS: dict[str, tuple[dict[str, torch.dtype], float]] = {
    "sgd": (FLAT, 9),
    "lion": ({**FLAT, "exp_avgs": torch.float32}, 17),
    "adamw": ({**FLAT, **MOMENTS}, 25),
    "adamw_8bit": ({**FLAT, **CODES, **SCALES}, 13),
}


def flat(seed: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """Positive, as second moments and scales are, but for params and grads."""
    numbers = random(seed, "cpu", ((PERIOD, 1024), torch.float32))[0]
    numbers = (numbers.abs() * 80).clamp(max=255) if dtype == torch.uint8 else numbers
    numbers = numbers.abs() if dtype == torch.float32 else numbers
    return repeat(numbers.to(dtype), count // 1024 + 1).flatten()[:count]


def elements() -> Iterator[slice]:
    """Of whole blocks, whose scales are then enough for the rule: the first, those around 2³⁰ and 2³¹, the last."""
    for at in (0, 2**30 - 128 * BLOCK, 2**31 - 128 * BLOCK):
        yield slice(at, at + 256 * BLOCK)
    yield slice(COUNT // BLOCK * BLOCK - 256 * BLOCK, COUNT)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    dtypes, gib = OPTIMIZERS[name]
    need(gib)
    op = get(name)
    names = op.forward_schema.names
    args: dict[str, Any] = {}
    for i, argument in enumerate(op.forward_schema.arguments):
        if argument.name in dtypes:
            count = -(-COUNT // BLOCK) if argument.name in SCALES else COUNT
            args[argument.name] = [flat(i, dtypes[argument.name], count)]
        else:
            args[argument.name] = [] if argument.type == "Tensor[]" else {**SCALARS, **OFF, **NONE}[argument.name]

    def cut(where: slice, dtype: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        blocks = slice(where.start // BLOCK, -(-where.stop // BLOCK))
        return {
            key: [dtype(tensor[blocks if key in SCALES else where].clone()) for tensor in value]
            if isinstance(value, list)
            else value
            for key, value in args.items()
        }

    reference, pieces = op.implementations["reference"], []
    for where in elements():
        same, true = cut(where, lambda t: t), cut(where, lambda t: t.double() if t.is_floating_point() else t)
        pieces.append((where, same, true))
        reference.forward(*same.values())
        reference.forward(*true.values())
    op.implementations["cpu"].forward(*args.values())
    for where, same, true in pieces:
        ours = cut(where, lambda t: t)
        for written in (names[i] for i in op.written if args[names[i]]):
            verdict = judge(written, [(ours[written][0], same[written][0], true[written][0])])
            assert verdict.right, f"elements {where}: {verdict}"


def test_grad_norm():
    need(5)
    tensor = flat(1, torch.bfloat16, COUNT)
    period = tensor[: PERIOD * 1024].double().square()
    whole, rest = divmod(COUNT, PERIOD * 1024)
    true = (whole * period.sum() + period[:rest].sum()).sqrt()
    norm = get("grad_norm").implementations["cpu"].forward([tensor])
    assert abs(norm - true) <= true * torch.finfo(torch.float32).eps


def test_append_kv():
    """Into an int8 cache of one sequence, and into the same as pages."""
    need(3)
    dim, rows = 256, rows_of(256) // 4 * 4
    k, v = random(0, "cpu", ((1, 4, 1, dim), torch.bfloat16), ((1, 4, 1, 1), torch.bfloat16))
    codes, factors = quantise(k)
    k_cache = torch.zeros(1, rows, 1, dim, dtype=torch.int8)
    v_cache, scales = torch.zeros(1, rows, 1, 1, dtype=torch.int8), torch.zeros(2, 1, rows, 1)
    append = get("append_kv").implementations["cpu"].forward
    for where in places(rows, dim):
        for size in (rows, 4):
            table = None if size == rows else torch.arange(rows // 4, dtype=torch.int32).unsqueeze(0)
            given = [x.view(-1, size, *x.shape[2:]) for x in (k_cache, v_cache, *scales)]
            append(k, v, *given, torch.tensor([where.start], dtype=torch.int32), table, None, None, False)
            assert torch.equal(k_cache[:, where], codes) and torch.equal(scales[0][:, where], factors)
            k_cache[:, where] = 0
            scales[0][:, where] = 0
    assert not scales[0].any() and not k_cache.any()
