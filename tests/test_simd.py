"""csrc/cpu/simd on every instruction set of this machine, and as compiled for AVX-512 on AVX2."""

import ctypes
import math
import re
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from llmsys import _C
from llmsys.ops._native import DTYPES
from tests import avx512, build
from tests.harness import same_bits

EMULATED = "avx512 emulated"
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
FLAGS = {
    "baseline": ("-DLLMSYS_ISA=baseline",),
    "avx2": ("-DLLMSYS_ISA=avx2", "-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-DLLMSYS_ISA=avx512", *AVX512),
    "avx512_bf16": ("-DLLMSYS_ISA=avx512_bf16", *AVX512, "-mavx512bf16"),
    EMULATED: avx512.FLAGS,
}
VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64, "avx512_bf16": 64, EMULATED: 64}
WAYS = ("single", "pair", "streamed_pair", "block", "streamed_block", "partial")  # as in simd.cpp
HALVES = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))
isas = pytest.mark.parametrize("isa", FLAGS)
ways = pytest.mark.parametrize("way", WAYS)
halves = pytest.mark.parametrize("half", HALVES, ids=str)


@cache
def library(isa: str) -> ctypes.CDLL:
    """simd.cpp compiled for this instruction set."""
    if isa == EMULATED and (missing := avx512.why_not()):
        pytest.skip(missing)
    if isa != EMULATED and isa not in _C.cpu.isas():
        pytest.skip(f"this machine cannot run {isa}")
    flags = (*FLAGS[isa], "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi")
    return ctypes.CDLL(build.link("simd.so", build.compile([(build.ROOT / "tests" / "simd.cpp", flags)]), "-shared"))


def aligned(size: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN from the start of a cache line on."""
    buffer = torch.full((size + 64,), float("nan"), dtype=dtype)
    skipped = -buffer.data_ptr() % 64 // buffer.element_size()
    return buffer[skipped : skipped + size]


def converted(isa: str, way: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = aligned(len(values), dtype)
    address = ctypes.c_void_p
    library(isa).convert(
        *(WAYS.index(way), address(values.data_ptr()), DTYPES[values.dtype]),
        *(address(result.data_ptr()), DTYPES[dtype], ctypes.c_int64(len(values))),
    )
    return result


def mapped(isa: str, function: str, values: torch.Tensor) -> torch.Tensor:
    result = aligned(len(values), torch.float32)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, result))
    getattr(library(isa), function)(*pointers, ctypes.c_int64(len(values)))
    return result


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 values of a 16-bit format."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def assert_same_but_for_payloads(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(result.isnan(), expected.isnan())
    zero = torch.zeros((), dtype=result.dtype)
    assert same_bits(result.where(~expected.isnan(), zero), expected.where(~expected.isnan(), zero))


@isas
def test_width(isa):
    assert library(isa).vector_bytes() == VECTOR_BYTES[isa]


@isas
@ways
@halves
def test_every_16_bit_value(isa, way, half):
    """To float32 as torch has it, and back to the same bits."""
    wide = converted(isa, way, patterns(half), torch.float32)
    assert_same_but_for_payloads(wide, patterns(half).float())
    assert_same_but_for_payloads(converted(isa, way, wide, half), patterns(half))
    assert_same_but_for_payloads(converted(isa, way, patterns(half), half), patterns(half))


@isas
@ways
@halves
def test_rounds_as_torch(isa, way, half):
    """To nearest, ties to even: random bits, then all ties and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (2**21,), generator=generator).to(torch.int32).view(torch.float32)
    # Most random bits are beyond float16: as many again from its exponents, with those that become 0 and infinity.
    exponents = torch.randint(127 - 27, 127 + 18, anything.shape, generator=generator).to(torch.int32)
    in_range = ((anything.view(torch.int32) & ~0x7F800000) | (exponents << 23)).view(torch.float32)
    finite = patterns(half)[patterns(half).isfinite()].double()
    finite = finite.unique(sorted=True)
    ties = ((finite[1:] + finite[:-1]) / 2).float()  # exact
    above, below = (torch.nextafter(ties, torch.full_like(ties, end)) for end in (torch.inf, -torch.inf))
    values = torch.cat([anything, in_range, ties, above, below, finite.float()])
    values = torch.nn.functional.pad(values, (0, -len(values) % 32))
    assert_same_but_for_payloads(converted(isa, way, values, half), values.to(half))


@isas
@ways
def test_float32_stays(isa, way):
    values = torch.arange(2**16, dtype=torch.int32).mul(65521).view(torch.float32)
    assert same_bits(converted(isa, way, values, torch.float32), values)


def ulps(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance of float32 `y` from float64 `expected`, in units of its last place."""
    # Infinity counts as the number that would follow the largest.
    y, expected = (t.double().clamp(max=2.0**128) for t in (y, expected))
    ulp = torch.ldexp(torch.ones_like(expected), (expected.frexp().exponent - 24).clamp(-149, 104))
    return ((y - expected).abs() / ulp).max().item()


def assert_near(y: torch.Tensor, x: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    assert torch.equal(y.isnan(), x.isnan())
    if len(y):
        worst = ulps(y[~x.isnan()], expected[~x.isnan()])
        assert worst <= most, worst


def arguments(*edges: tuple[float, float]) -> Iterator[torch.Tensor]:
    """A value in 1021 of all float32, many over [-16, 16], and every one between two edges."""
    bits = [torch.tensor(ends).view(torch.int32).tolist() for ends in edges]
    for first, last, step in ((-(2**31), 2**31, 1021), *((first, last, 1) for first, last in bits)):
        x = torch.arange(first, last, step).to(torch.int32).view(torch.float32)
        yield x[: len(x) // 32 * 32]
    yield torch.linspace(-16, 16, 2**20)


FUNCTIONS = {
    "vector_exp": torch.exp,
    "block_exp": torch.exp,
    "vector_tanh": torch.tanh,
    "vector_bell": lambda x: torch.exp(-x * x / 2),
}
# Where results become 0, infinity or 1, where one formula takes over from another, and all that matters most.
EDGES = {
    "vector_exp": ((88.70, 88.75), (-103.95, -104.05)),
    "block_exp": ((88.70, 88.75), (-103.95, -104.05)),
    "vector_tanh": ((0.62, 0.63), (-0.62, -0.63), (9.0, 9.1)),
    "vector_bell": ((12.99, 13.01), (14.4, 14.5)),
}


@isas
@pytest.mark.parametrize("function", FUNCTIONS)
def test_within_two_ulp(isa, function):
    for x in arguments(*EDGES[function]):
        assert_near(mapped(isa, function, x), x, FUNCTIONS[function](x.double()), 2)


@isas
def test_normal_cdf(isa):
    """Three ulp from 0 up, and seven on the way down to 0, which PyTorch's 0.5 (1 + erf) reaches at -5.5."""
    for x in arguments((-14.1, -14.2), (-12.99, -13.01), (5.41, 5.42)):
        y, expected = mapped(isa, "vector_normal_cdf", x), torch.erfc(x.double() / -math.sqrt(2)) / 2
        above = ~(x < 0)
        assert_near(y[above], x[above], expected[above], 3)
        assert_near(y[~above], x[~above], expected[~above], 7)


@isas
def test_sqrt_is_rounded_right(isa):
    x = torch.arange(0, 0x7F800000 + 32 * 509, 509).to(torch.int32).view(torch.float32)
    x = x[: len(x) // 32 * 32]
    assert_same_but_for_payloads(mapped(isa, "vector_sqrt", x), x.double().sqrt().float())


def call(isa: str, function: str, *args: torch.Tensor | int) -> int:
    given = [ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else ctypes.c_int64(arg) for arg in args]
    return getattr(library(isa), function)(*given)


@isas
@pytest.mark.parametrize("shift", [-1, 0, 127])
def test_bytes_saturate_in_order(isa, shift):
    values = torch.arange(-448, 576, dtype=torch.int32)
    found = torch.zeros(len(values), dtype=torch.uint8)
    call(isa, "saturated_bytes", values, found, len(values), shift)
    assert torch.equal(found, (values + shift).clamp(0, 255).to(torch.uint8))


@isas
@pytest.mark.parametrize("way", ["single", "partial"])
def test_bytes_are_rounded_to_nearest_even(isa, way):
    values = torch.arange(-512, 509) / 4  # -128 to 127, ties among them
    found = torch.full((len(values) + 1,), 77, dtype=torch.int8)
    call(isa, "rounded_bytes", WAYS.index(way), values, found, len(values))
    assert torch.equal(found[:-1], values.round().to(torch.int8)) and found[-1] == 77


@isas
def test_lookups_wrap_around(isa):
    eight = torch.arange(8, dtype=torch.float32) + 0.5
    sixteen = torch.arange(16, dtype=torch.int32) * 0x01010101
    index = torch.randint(-(2**31), 2**31, (512,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    of_eight, of_sixteen = torch.zeros(512), torch.zeros(512, dtype=torch.int32)
    call(isa, "look_up", eight, sixteen, index, of_eight, of_sixteen, 512)
    assert torch.equal(of_eight, eight[index.long() % 8])
    assert torch.equal(of_sixteen, sixteen[index.long() % 16])


@isas
def test_extremes_are_the_second_where_one_is_nan(isa):
    some = torch.tensor([math.nan, -math.inf, -1.0, -0.0, 0.0, 2.0, math.inf, 1e-45])
    a, b = some.repeat_interleave(8), some.repeat(8)
    lower, upper = torch.zeros(64), torch.zeros(64)
    call(isa, "extremes", a, b, lower, upper, 64)
    assert same_bits(lower, torch.where(a < b, a, b)) and same_bits(upper, torch.where(a > b, a, b))


@isas
def test_largest_lane(isa):
    for at in range(VECTOR_BYTES[isa] // 4):
        lanes = torch.arange(VECTOR_BYTES[isa] // 4, dtype=torch.int32)
        lanes[at] = -5  # the most but four, without a sign
        assert call(isa, "largest_lane", lanes) == -5


def test_an_intrinsic_without_emulation_does_not_compile(tmp_path):
    if missing := avx512.why_not():
        pytest.skip(missing)
    source = tmp_path / "missing.cpp"
    for call, fails in (("_mm512_sqrt_ps(x)", False), ("_mm512_rcp14_ps(x)", True)):
        source.write_text(f"#include <immintrin.h>\nvoid f(__m512& x) {{ x = {call}; }}\n")
        if fails:
            with pytest.raises(RuntimeError, match="target specific option mismatch"):
                build.compile([(source, avx512.FLAGS)])
        else:
            build.compile([(source, avx512.FLAGS)])


def test_every_emulated_intrinsic_is_used():
    header = (build.ROOT / "tests" / "avx512" / "immintrin.h").read_text()
    kernels = "".join(path.read_text() for path in (build.ROOT / "csrc" / "cpu").rglob("*.*"))
    kernels = re.sub(r"#if defined\(__AVX512BF16__\).*?#endif", "", kernels, flags=re.DOTALL)
    assert set(re.findall(r"#define (_mm512_\w+)", header)) == set(re.findall(r"_mm512_\w+", kernels))
