"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ with this folder's stand-ins for CUDA's headers.

`register(op)` gives an op the implementation `cuda_simt`, called by name only. Objects are kept in build/simt under a
hash of what they are made of. In a process that AddressSanitizer is loaded into, the kernels are built with it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from llmsys.ops._native import Kernels
from llmsys.ops._op import Op

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
BINDINGS = ("-DLLMSYS_WITH_CPU=0", "-DLLMSYS_WITH_CUDA=1", "-DLLMSYS_MODULE=llmsys_simt")


def why_not() -> str | None:
    """Why this machine cannot build the simulator; None when it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def register(op: Op) -> None:
    """Give `op` the implementation `cuda_simt` if it has CUDA kernels; they are built at the first call."""
    if "cuda" in op.implementations and "cuda_simt" not in op.implementations:
        missing = why_not()
        kernels = Kernels("cuda_simt", "cpu", None if missing else _Lazy(), missing or "")
        native = importlib.import_module(f"llmsys.ops.{op.name}.native")
        op.implementations["cuda_simt"] = native.implementation(kernels)


class _Lazy(ModuleType):
    """Stands for the `cuda` part of the module until one of its functions is called."""

    def __init__(self) -> None:
        super().__init__("llmsys_simt.cuda")

    def __getattr__(self, name: str):
        return lambda *args: getattr(module().cuda, name)(*args)


@cache
def module() -> ModuleType:
    """The module `llmsys_simt`: csrc/bindings over csrc/cuda."""
    import pybind11

    sanitize = SANITIZE if has_address_sanitizer() else ()
    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", *BINDINGS)
    objects = _compile(
        [
            *((source, python) for source in sorted((ROOT / "csrc/bindings").glob("*.cpp"))),
            *((source, sanitize) for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))),
            *((HERE / source, sanitize) for source in ("fiber.cpp", "simt.cpp")),
        ]
    )
    path = _link("llmsys_simt" + sysconfig.get_config_var("EXT_SUFFIX"), objects, ("-shared", *sanitize))
    spec = importlib.util.spec_from_file_location("llmsys_simt", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def program(source: Path, flags: Sequence[str] = ()) -> Path:
    """An executable from one source file of kernels with a main(), compiled with `flags`."""
    flags = tuple(flags)
    return _link(
        source.stem, _compile([(path, flags) for path in (source, HERE / "fiber.cpp", HERE / "simt.cpp")]), flags
    )


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
    """Whether AddressSanitizer was loaded into this process, as `sanitized_environment` has it."""
    return hasattr(ctypes.CDLL(None), "__asan_init")


def sanitized_environment() -> dict[str, str]:
    """Environment variables of a Python process in which kernels are watched by AddressSanitizer.

    AddressSanitizer wants the C++ library there when it starts. Python frees nothing at its end, so leaks do not count.
    """
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


@cache
def _surroundings() -> bytes:
    """What every object depends on: compiler, headers."""
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.h")]
    return version + b"".join(path.read_bytes() for path in sorted(headers))


def _compile(sources: Sequence[tuple[Path, tuple[str, ...]]]) -> list[Path]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: _object(*pair), sources))


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    command = ["g++", *FLAGS, *flags, f"-I{HERE}", f"-I{ROOT / 'csrc' / 'cuda'}", "-x", "c++", "-c", str(source)]
    key = hashlib.sha256(_surroundings() + source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    return _make(BUILD / f"{source.stem}-{key}.o", command)


def _link(name: str, objects: list[Path], flags: tuple[str, ...]) -> Path:
    key = hashlib.sha256(" ".join(map(str, [*objects, *flags])).encode()).hexdigest()[:16]
    (BUILD / key).mkdir(exist_ok=True)
    return _make(BUILD / key / name, ["g++", *flags, *map(str, objects)])


def _make(target: Path, command: list[str]) -> Path:
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}")  # another process may be making it too
        run = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"tests.simt: {' '.join(command)} failed\n{run.stderr}")
        partial.replace(target)
    return target
