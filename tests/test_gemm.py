"""csrc/cpu/gemm.h on every instruction set of this machine, and as compiled for AVX-512 on AVX2."""

import ctypes
from functools import cache
from itertools import product

import pytest
import torch

from llmsys import _C
from llmsys.ops._native import DTYPES
from tests import avx512, build
from tests.harness import same_bits
from tests.test_simd import EMULATED, FLAGS

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))
isas = pytest.mark.parametrize("isa", FLAGS)
panels = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)  # of elements, of pairs
MAX_DEPTH = 256  # as in gemm.cpp; pairs of bfloat16 take twice that


@cache
def library(isa: str) -> ctypes.CDLL:
    """gemm.cpp compiled for this instruction set."""
    if isa == EMULATED and (missing := avx512.why_not()):
        pytest.skip(missing)
    if isa != EMULATED and isa not in _C.cpu.isas():
        pytest.skip(f"this machine cannot run {isa}")
    flags = (*FLAGS[isa], "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi", "-fopenmp")
    sources = [build.ROOT / path for path in ("csrc/cpu/gemm.cpp", "csrc/cpu/dispatch.cpp", "tests/gemm.cpp")]
    return ctypes.CDLL(build.link("gemm.so", build.compile([(path, flags) for path in sources]), "-shared", "-fopenmp"))


def tile_shape(isa: str) -> tuple[int, int]:
    shape = (ctypes.c_int * 2)()
    library(isa).tile_shape(shape)
    return tuple(shape)


def multiply(isa: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    """c = a b, or c += a b; c's rows are contiguous."""
    sizes = (*c.shape, a.shape[1], *a.stride(), *reversed(b.stride()), c.stride(0))
    arrays = [argument for t in (a, b, c) for argument in (ctypes.c_void_p(t.data_ptr()), DTYPES[t.dtype])]
    library(isa).multiply((ctypes.c_int64 * 8)(*sizes), *arrays, int(accumulate))
    return c


def product_of(isa: str, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """a b in a fresh tensor, whose surroundings must survive."""
    fenced = torch.full((a.shape[0] + 2, b.shape[1] + 3), 77.0, dtype=dtype)
    c = fenced[1:-1, :-3].fill_(float("nan"))
    multiply(isa, a, b, c)
    assert (fenced[[0, -1]] == 77).all() and (fenced[:, -3:] == 77).all(), "written outside"
    return c


def matrices(rows: int, cols: int, depth: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, depth), (depth, cols)))


def assert_close(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Within float32's worst case for runs of MAX_DEPTH, and one rounding to c's type."""
    true, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    depth = MAX_DEPTH * (2 if a.dtype == b.dtype == torch.bfloat16 else 1)
    terms = min(a.shape[1], depth) + a.shape[1] // depth + 1
    bound = terms * 2.0**-24 * magnitude + torch.finfo(c.dtype).eps / 2 * true.abs() + torch.finfo(c.dtype).tiny
    assert ((c.double() - true).abs() <= bound).all()


def layouts(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides: by rows, by columns, with gaps, with no stride of one."""
    wide = torch.full((matrix.shape[0], 2 * matrix.shape[1] + 3), float("nan"), dtype=matrix.dtype)
    wide[:, : 2 * matrix.shape[1] : 2] = matrix
    gapped = torch.full((matrix.shape[0], matrix.shape[1] + 5), float("nan"), dtype=matrix.dtype)
    gapped[:, 1:-4] = matrix
    return {
        "rows": matrix.contiguous(),
        "columns": matrix.t().contiguous().t(),
        "gapped": gapped[:, 1:-4],
        "strided": wide[:, : 2 * matrix.shape[1] : 2],
    }


@isas
@panels
def test_sizes_around_the_tile(isa, dtype):
    height, width = tile_shape(isa)
    sizes = {1, height - 1, height, height + 1, 2 * height + 1}, {1, 3, width - 1, width, width + 1}, {1, 5, 16, 33}
    for rows, cols, depth in product(*sizes):
        a, b = matrices(rows, cols, depth, dtype)
        assert_close(product_of(isa, a, b), a, b)


@isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(isa, dtype):
    a, b = matrices(19, 37, 2 * MAX_DEPTH + 21, dtype)
    for left, right in product(layouts(a).values(), layouts(b).values()):
        assert_close(product_of(isa, left, right), a, b)
        assert same_bits(product_of(isa, left, right), product_of(isa, a, b))


@isas
def test_types_mixed(isa):
    for left, right, result in product(DTYPES, DTYPES, DTYPES):
        a, b = matrices(9, 21, 40)
        a, b = a.to(left), b.to(right)
        assert_close(product_of(isa, a, b, result), a, b)


@isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulates(isa, dtype):
    a, b = matrices(19, 37, MAX_DEPTH + 9, dtype)
    start = torch.randn(19, 37).to(dtype)
    c = multiply(isa, a, b, start.clone(), accumulate=True)
    assert same_bits(c, (product_of(isa, a, b) + start.float()).to(dtype))


@isas
@panels
@pytest.mark.parametrize("size", [(1100, 70, 300), (70, 2100, 300), (300, 1100, 513), (700, 40, 3)], ids=str)
def test_blocks(isa, dtype, size):
    """More rows and columns than one block of packed A, of packed B, and of sums."""
    a, b = matrices(*size, dtype)
    assert_close(product_of(isa, a, b), a, b)


@isas
@panels
def test_bits_depend_on_nothing_but_the_row_and_the_column(isa, dtype):
    """Any number of threads, and any rows and columns beside, give the same element."""
    a, b = matrices(230, 150, 600, dtype)
    whole = product_of(isa, a, b)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            assert same_bits(product_of(isa, a, b), whole)
    finally:
        torch.set_num_threads(threads)
    for rows, cols in ((1, 150), (2, 150), (5, 33), (100, 1), (7, 16)):
        assert same_bits(product_of(isa, a[-rows:], b[:, -cols:]), whole[-rows:, -cols:])


@isas
@panels
def test_nothing_to_sum(isa, dtype):
    a, b = matrices(5, 9, 0, dtype)
    assert (product_of(isa, a, b) == 0).all()
    start = torch.randn(5, 9)
    assert same_bits(multiply(isa, a, b, start.clone(), accumulate=True), start)
    assert product_of(isa, *matrices(0, 9, 4)).numel() == product_of(isa, *matrices(9, 0, 4)).numel() == 0


@isas
def test_infinity_stays_in_its_row_and_column(isa):
    a, b = matrices(13, 37, 40)
    a[3, 5], b[7, 11] = float("inf"), float("nan")
    c = product_of(isa, a, b)
    assert c[:, 11].isnan().all() and c[3].isfinite().sum() == 0
    c[:, 11], c[3] = 0.0, 0.0
    assert c.isfinite().all()
