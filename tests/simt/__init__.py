"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ with this folder's stand-ins for CUDA's headers.

`register(op)` gives an op the implementation `cuda_simt`, called by name only. In a process that AddressSanitizer is
loaded into, the kernels are built with it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from llmsys.ops._native import Kernels
from llmsys.ops._op import Op
from tests import build

HERE = Path(__file__).parent
ROOT = build.ROOT
SANITIZE = ("-fsanitize=address,alignment,signed-integer-overflow", "-fno-sanitize-recover=all", "-g1")
SOURCES = tuple(HERE / name for name in ("fiber.cpp", "ptx.cpp", "simt.cpp"))
FLAGS = ("-O1", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{ROOT / 'csrc' / 'cuda'}")

why_not = build.why_not


def register(op: Op) -> None:
    """Give `op` the implementation `cuda_simt` if it has a CUDA one; the kernels are built at the first call."""
    if "cuda" in op.implementations and "cuda_simt" not in op.implementations:
        native = importlib.import_module(f"llmsys.ops.{op.name}.native")
        missing = why_not()
        kernels = Kernels("cuda_simt", "cpu", None if missing else build.Lazy(module, "cuda"), missing or "")
        op.implementations["cuda_simt"] = native.implementation(kernels)


@cache
def module() -> ModuleType:
    """The module `llmsys_simt`: csrc/bindings over csrc/cuda."""
    sanitize = SANITIZE if has_address_sanitizer() else ()
    python = build.binding_flags("llmsys_simt", "cuda")
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    objects = build.compile(
        [
            *((source, python) for source in build.bindings({_op_of(source) for source in kernels})),
            *((source, (*FLAGS, *sanitize)) for source in (*kernels, *SOURCES)),
        ]
    )
    return build.load("llmsys_simt", objects, *sanitize)


def _op_of(kernels: Path) -> str:
    """The op whose kernels are in this file, which may have those of one direction alone."""
    return kernels.stem.removesuffix("_forward").removesuffix("_backward")


def program(source: Path, flags: Sequence[str] = ()) -> Path:
    """An executable from one source file of kernels with a main(), compiled with `flags`."""
    objects = build.compile([(path, (*FLAGS, *flags)) for path in (source, *SOURCES)])
    return build.link(source.stem, objects, *flags)


def seed(value: int) -> None:
    """Threads and blocks run in another order for each `value`; 0 until this is called."""
    ctypes.CDLL(module().__file__).simt_seed(ctypes.c_uint64(value))


@contextmanager
def without_barrier(file: str, line: int) -> Iterator[None]:
    """Inside, kernels run as if the `__syncthreads()` on this line of csrc/cuda/`file` were not there."""
    skip = ctypes.CDLL(module().__file__).simt_skip_barrier
    skip(file.encode(), line)
    try:
        yield
    finally:
        skip(b"", 0)


def has_address_sanitizer() -> bool:
    """Whether AddressSanitizer was loaded into this process, as `build.sanitized_environment` has it."""
    return hasattr(ctypes.CDLL(None), "__asan_init")
