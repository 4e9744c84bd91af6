"""Every Triton kernel compiles for every target, keeps its values in registers, and moves 16 bytes at a time."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

from tests.triton.compiled import CASES, PLAN, Kernel

pytest.importorskip("triton")

# So many registers leave room for 16 warps on an SM (65536 registers, 32 threads a warp): what the backward of RMSNorm
# fills an SM with, and the largest block. A gfx942 block of 16 wavefronts has as many for each thread.
MAX_REGISTERS = 128
MAX_SHARED = 48 * 1024  # bytes a CUDA block gets without asking
# Kernels of matrix products that keep tiles of sums in registers: one or two blocks an SM, with what they ask for.
TILED = ("attention", "attention_decode")
TILED_REGISTERS = {"gfx942": 512}  # per thread where no more than four wavefronts run on an SIMD; NVIDIA's limit is 255
TILED_SHARED = {"sm_80": 99 * 1024, "gfx942": 64 * 1024}  # of the smallest GPU like it; on the others
HOPPER_SHARED = 227 * 1024


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> dict[tuple[str, str], list[Kernel]]:
    """(case, target) → kernels, compiled in a process without the interpreter, into a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.triton.compiled", "--json"]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = defaultdict(list)
    for line in output.splitlines():
        fields = json.loads(line)
        found[fields.pop("case"), fields.pop("target")].append(Kernel(**fields))
    return found


@pytest.mark.parametrize("case, target", PLAN)
def test_compiles_within_registers(kernels, case, target):
    assert kernels[case, target], "nothing was launched"
    for kernel in kernels[case, target]:
        print(f"{case} {target}: {kernel}")
        assert kernel.stack == 0, "registers are spilled"
        tiled = CASES[case].op in TILED
        assert kernel.shared <= (TILED_SHARED.get(target, HOPPER_SHARED) if tiled else MAX_SHARED)


@pytest.mark.parametrize("case, target", [(name, target) for name, target in PLAN if CASES[name].aligned])
def test_multiples_of_16_are_fast(kernels, case, target):
    for kernel in kernels[case, target]:
        assert kernel.wide > 0, "nothing moves 16 bytes at a time"
        tiled = CASES[case].op in TILED
        assert kernel.registers <= (TILED_REGISTERS.get(target, 255) if tiled else MAX_REGISTERS)
