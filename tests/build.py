"""Native code that only the tests need: compiled by g++, kept in build/tests under a hash of what it is made of."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "tests"
HEADERS = (".h", ".cuh")
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def why_not() -> str | None:
    """Why this machine cannot build what the tests need; None when it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def bindings(only: set[str] | None = None) -> list[Path]:
    """The sources of csrc/bindings: module.cpp, and those of the ops in `only`."""
    sources = sorted((ROOT / "csrc" / "bindings").glob("*.cpp"))
    return [source for source in sources if only is None or source.stem in {"module", *only}]


def binding_flags(module: str, device: str) -> tuple[str, ...]:
    """What the bindings are compiled with for a module of this name that has the kernels of one device."""
    import pybind11

    devices = [f"-DLLMSYS_WITH_{name}={int(name.lower() == device)}" for name in ("CPU", "CUDA")]
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    return ("-O0", f"-DLLMSYS_MODULE={module}", *devices, *includes)


def compile(sources: Sequence[tuple[Path, tuple[str, ...]]]) -> list[Path]:
    """The objects of `sources`, each with its flags."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: _object(*pair), sources))


def link(name: str, objects: list[Path], *flags: str) -> Path:
    """The program or library of this name."""
    key = hashlib.sha256(" ".join(map(str, [*objects, *flags])).encode()).hexdigest()[:16]
    (BUILD / key).mkdir(exist_ok=True)
    return _make(BUILD / key / name, ["g++", *flags, *map(str, objects)])


def load(name: str, objects: list[Path], *flags: str) -> ModuleType:
    """The Python module of this name."""
    path = link(name + sysconfig.get_config_var("EXT_SUFFIX"), objects, "-shared", *flags)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized_environment() -> dict[str, str]:
    """Environment variables of a Python process in which code built with AddressSanitizer runs.

    AddressSanitizer wants the C++ library there when it starts. Python frees nothing at its end, so leaks do not count.
    """
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


class Lazy(ModuleType):
    """Stands for the part of a module that has one device's kernels until one of its functions is called."""

    def __init__(self, module, device: str) -> None:
        super().__init__(device)
        self._kernels = lambda: getattr(module(), device)

    def __getattr__(self, name: str):
        return lambda *args: getattr(self._kernels(), name)(*args)


@cache
def _surroundings() -> bytes:
    """What every object depends on: compiler, headers."""
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    headers = [
        path for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*.[hc]*") if path.suffix in HEADERS
    ]
    return version + b"".join(path.read_bytes() for path in sorted(headers))


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    command = ["g++", *FLAGS, *flags, "-x", "c++", "-c", str(source)]
    key = hashlib.sha256(_surroundings() + source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    return _make(BUILD / f"{source.stem}-{key}.o", command)


def _make(target: Path, command: list[str]) -> Path:
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}")  # another process may be making it too
        run = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"tests.build: {' '.join(command)} failed\n{run.stderr}")
        partial.replace(target)
    return target
