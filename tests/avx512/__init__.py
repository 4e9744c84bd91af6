"""The CPU kernels as compiled for AVX-512, on a machine with AVX2 only: this folder's <immintrin.h> stands in for it.

`register(op)` gives an op the implementation `cpu[avx512 emulated]`, called by name only.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from llmsys import _C
from llmsys.ops._native import Kernels
from llmsys.ops._op import Op
from tests import build

NAME = "cpu[avx512 emulated]"
FLAGS = (
    *("-DLLMSYS_ISA=avx512", "-DLLMSYS_ISA_ALONE", "-DLLMSYS_EMULATED_AVX512", f"-I{Path(__file__).parent}"),
    *("-mavx2", "-mfma", "-mf16c", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-Wno-psabi", "-fopenmp"),
)


def why_not() -> str | None:
    """Why the emulation cannot be built and run on this machine; None when it can."""
    return build.why_not() or (None if "avx2" in _C.cpu.isas() else "it runs on AVX2, which this machine does not have")


def register(op: Op) -> None:
    """Give `op` the implementation `cpu[avx512 emulated]` if it has a CPU one; built at the first call."""
    if "cpu" in op.implementations and NAME not in op.implementations:
        native = importlib.import_module(f"llmsys.ops.{op.name}.native")
        missing = "this machine runs avx512 itself" if "avx512" in _C.cpu.isas() else why_not()
        kernels = Kernels(NAME, "cpu", None if missing else build.Lazy(module, "cpu"), missing or "")
        op.implementations[NAME] = native.implementation(kernels)


@cache
def module() -> ModuleType:
    """The module `llmsys_avx512`: csrc/bindings over csrc/cpu."""
    python = build.binding_flags("llmsys_avx512", "cpu")
    objects = build.compile(
        [
            *((source, FLAGS) for source in sorted((build.ROOT / "csrc" / "cpu").glob("*.cpp"))),
            *((source, python) for source in build.bindings()),
        ]
    )
    return build.load("llmsys_avx512", objects, "-fopenmp")
