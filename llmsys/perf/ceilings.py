"""What this machine's memory and matrix units reach, measured here and now, once per process.

Every figure is the best over several ways of doing the work and several tries: a ceiling, not an average.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from llmsys import env
from llmsys.perf.timer import last_level_cache_bytes

TRIES = 10
NATIVE_BLOCK_BYTES = 65536  # csrc/memory.h: what the native kernels move is a multiple of it
GEMM_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (1024, 2048, 1024), (2048, 1024, 512))  # (M, N, K)
GEMM_SHAPES_CUDA = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 8192, 4096))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of main memory with all threads. `copy` counts the bytes read and the bytes written."""

    read: float
    write: float
    copy: float
    ways: dict[str, float]  # every way tried, such as "copy: libc memmove"


def bandwidth(device: str = "cpu") -> Bandwidth:
    """Read, write and copy bandwidth between main memory and registers, over buffers of four last-level caches."""
    return _bandwidth(device)


def gemm_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Floating-point operations per second of `torch.mm` in `dtype`, the best over a few shapes.

    The first shape decides the layout of the second factor for the rest: with bfloat16 on a CPU without bfloat16
    instructions, a transposed factor was 12 times quicker than a contiguous one (torch 2.13, AMD Zen 3).

    Errors     ValueError if dtype is not of floating point
    """
    if not dtype.is_floating_point:
        raise ValueError(f"llmsys.perf.gemm_rate: dtype {dtype}, expected a floating-point dtype")
    return _gemm_rate(dtype, device)


def copier(num_bytes: int, device: str = "cpu") -> Callable[[], object]:
    """A copy that moves `num_bytes` in all, half read and half written: native where that is built, else torch's.

    Errors     ValueError unless num_bytes is a multiple of 131072
    """
    if num_bytes <= 0 or num_bytes % (2 * NATIVE_BLOCK_BYTES):
        raise ValueError(
            f"llmsys.perf.copier: num_bytes={num_bytes}, expected a positive multiple of {2 * NATIVE_BLOCK_BYTES}"
        )
    source = torch.ones(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    ways = _torch_ways(source, target) | (_native_ways(source, target) if device == "cpu" else {})
    return ways.get("copy: native", ways["copy: torch copy_"])


def reader(num_bytes: int, num_sets: int, device: str = "cpu") -> Callable[[int], object] | None:
    """A read of about `num_bytes` from the buffer of this index, of `num_sets`; None without a kernel for it."""
    cpu = _native_cpu() if device == "cpu" else None
    if cpu is None:
        return None
    num_bytes = max(1, round(num_bytes / NATIVE_BLOCK_BYTES)) * NATIVE_BLOCK_BYTES
    sources = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(num_sets)]
    return lambda index: cpu.memory_traffic(0, sources[index % num_sets].data_ptr(), 0, num_bytes)


@cache
def _bandwidth(device: str) -> Bandwidth:
    num_bytes = max(4 * last_level_cache_bytes(device), 64 << 20) // NATIVE_BLOCK_BYTES * NATIVE_BLOCK_BYTES
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.ones_like(source)
    works = _torch_ways(source, target)
    if device == "cpu":
        works |= _libc_ways(source, target) | _native_ways(source, target)
    moved = {"read": num_bytes, "write": num_bytes, "copy": 2 * num_bytes}
    ways = {name: moved[name.split(":")[0]] / _best_s(work, device) for name, work in works.items()}
    best = {kind: max(rate for name, rate in ways.items() if name.startswith(kind)) for kind in moved}
    return Bandwidth(best["read"], best["write"], best["copy"], ways)


@cache
def _gemm_rate(dtype: torch.dtype, device: str) -> float:
    shapes = GEMM_SHAPES if device == "cpu" else GEMM_SHAPES_CUDA

    def rate(m: int, n: int, k: int, transposed: bool) -> float:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn((n, k) if transposed else (k, n), device=device).to(dtype)
        b = b.t() if transposed else b
        return 2 * m * n * k / _best_s(lambda: torch.mm(a, b), device, budget_s=0.3)

    first = {transposed: rate(*shapes[0], transposed) for transposed in (False, True)}
    transposed = first[True] > first[False]
    return max(first[transposed], *(rate(*shape, transposed) for shape in shapes[1:]))


def _torch_ways(source: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
    return {
        "read: torch sum": source.sum,
        "read: torch max": source.max,
        "write: torch fill_": lambda: target.fill_(1.0),
        "copy: torch copy_": lambda: target.copy_(source),
    }


def _libc_ways(source: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
    """memset and memmove of the C library, one slice per thread; ctypes releases the GIL for the call."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    bounds = [source.nbytes * i // threads for i in range(threads + 1)]
    slices = [(start, stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)]

    def write() -> None:
        list(pool.map(lambda part: ctypes.memset(target.data_ptr() + part[0], 0, part[1]), slices))

    def copy() -> None:
        move = ctypes.memmove
        list(pool.map(lambda part: move(target.data_ptr() + part[0], source.data_ptr() + part[0], part[1]), slices))

    return {"write: libc memset": write, "copy: libc memmove": copy}


def _native_ways(source: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Streaming kernels of `_C`, which write past the caches; none where `_C` is not built."""
    cpu = _native_cpu()
    if cpu is None:
        return {}
    stream, num_bytes = 0, source.nbytes
    return {
        "read: native": lambda: cpu.memory_traffic(stream, source.data_ptr(), 0, num_bytes),
        "write: native": lambda: cpu.memory_traffic(stream, 0, target.data_ptr(), num_bytes),
        "copy: native": lambda: cpu.memory_traffic(stream, source.data_ptr(), target.data_ptr(), num_bytes),
    }


def _native_cpu() -> ModuleType | None:
    return getattr(import_module("llmsys._C"), "cpu", None) if env.has("llmsys._C") else None


def _best_s(work: Callable[[], object], device: str, budget_s: float = 1.0) -> float:
    """Seconds of the quickest of `TRIES` runs, or of as many as fit in `budget_s` (two at least)."""
    best, tries = float("inf"), 0
    started = time.perf_counter()
    while tries < 2 or (tries < TRIES and time.perf_counter() - started < budget_s):
        start = time.perf_counter_ns()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter_ns() - start) * 1e-9)
        tries += 1
    return best
