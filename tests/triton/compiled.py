"""Compile, without a GPU, what the Triton implementations would launch, and read what the compiler made of it.

`python -m tests.triton.compiled` prints a table; `--json` one object a line. It must run without TRITON_INTERPRET,
which changes `triton.jit`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import product
from unittest import mock

import torch

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. `wide` counts its 16-byte accesses to global memory, `stack` is in bytes per thread."""

    name: str
    warps: int
    registers: int
    stack: int
    shared: int
    wide: int


# ---- what is launched: each case calls an implementation on tensors without data ----


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm(direction: str, rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> None:
    triton_kernels = import_module("llmsys.ops.rms_norm.triton_kernels")
    x, weight = meta(rows, dim, dtype=dtype), meta(dim, dtype=weight_dtype or dtype)
    if direction == "forward":
        triton_kernels.forward(x, weight, 1e-6, 0.0)
    else:
        triton_kernels.backward(x, x, weight, meta(rows, dtype=FLOAT32), 1e-6, 0.0)


def add_rms_norm(direction: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    triton_kernels = import_module("llmsys.ops.add_rms_norm.triton_kernels")
    x, weight = meta(rows, dim, dtype=dtype), meta(dim, dtype=dtype)
    if direction == "forward":
        triton_kernels.forward(x, x, weight, 1e-6, 0.0)
    else:
        triton_kernels.backward(x, x, x, weight, meta(rows, dtype=FLOAT32), 1e-6, 0.0)


def swiglu(direction: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    triton_kernels = import_module("llmsys.ops.swiglu.triton_kernels")
    x = meta(rows, dim, dtype=dtype)
    getattr(triton_kernels, direction)(*[x] * (2 if direction == "forward" else 3))


def rope(direction: str, heads: int, head_dim: int, dtype: torch.dtype, layout: str, rotary_dim: int) -> None:
    triton_kernels = import_module("llmsys.ops.rope.triton_kernels")
    x, table = meta(2, 2048, heads, head_dim, dtype=dtype), meta(2048, rotary_dim // 2, dtype=FLOAT32)
    getattr(triton_kernels, direction)(x, table, table, layout == "interleaved")


def linear(direction: str, rows: int, dim: int, dtype: torch.dtype, activation: str) -> None:
    triton_kernels = import_module("llmsys.ops.linear.triton_kernels")
    x, weight, bias = meta(rows, dim, dtype=dtype), meta(2 * dim, dim, dtype=dtype), meta(2 * dim, dtype=dtype)
    y = meta(rows, 2 * dim, dtype=dtype)
    if direction == "forward":
        triton_kernels.forward(x, weight, bias, activation, y)
    else:
        triton_kernels.backward(y, x, weight, bias, y, activation, True, True, True)


def adamw(param_dtype: torch.dtype, grad_dtype: torch.dtype, master: bool) -> None:
    triton_kernels = import_module("llmsys.ops.adamw.triton_kernels")
    wide = [meta(10_000, dtype=FLOAT32)] * 100
    params, grads = ([meta(10_000, dtype=dtype)] * 100 for dtype in (param_dtype, grad_dtype))
    masters = wide if master else []
    triton_kernels.forward(
        params, grads, wide, wide, masters, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1, meta(dtype=FLOAT32), False
    )


def _cases() -> dict[str, Callable[[], None]]:
    """Name → call. The sizes are the benchmarks', then those around the limits of what stays in registers."""
    cases = {}

    def add(call: Callable, *args: object) -> None:
        words = [str(arg).removeprefix("torch.") for arg in args]
        cases["-".join((call.__name__, *words))] = partial(call, *args)

    for direction in ("forward", "backward"):
        for dim, dtype in product((1024, 4096, 16384), (BFLOAT16, FLOAT32)):
            add(rms_norm, direction, 4096, dim, dtype)
            add(add_rms_norm, direction, 4096, dim, dtype)
        add(rms_norm, direction, 4096, 4096, BFLOAT16, FLOAT32)
        add(rms_norm, direction, 4096, 4096, FLOAT16)
        add(rms_norm, direction, 4096, 128, BFLOAT16)
        add(rms_norm, direction, 1, 1, FLOAT32)
        add(add_rms_norm, direction, 4096, 4095, BFLOAT16)
        add(add_rms_norm, direction, 4096, 8192, FLOAT32)
        add(add_rms_norm, direction, 4096, 16383, FLOAT32)
        add(add_rms_norm, direction, 4096, 65536, BFLOAT16)
        for dim, dtype in product((4096, 4097), (BFLOAT16, FLOAT32)):
            add(swiglu, direction, 4096, dim, dtype)
        add(swiglu, direction, 1, 1, FLOAT32)
        for layout, dtype in product(("halves", "interleaved"), (BFLOAT16, FLOAT32)):
            add(rope, direction, 32, 128, dtype, layout, 128)
        add(rope, direction, 8, 256, BFLOAT16, "halves", 64)
        for dim, dtype in ((4096, BFLOAT16), (4096, FLOAT32), (4097, BFLOAT16)):
            add(linear, direction, 2048, dim, dtype, "silu")
    add(adamw, FLOAT32, FLOAT32, False)
    add(adamw, BFLOAT16, BFLOAT16, True)
    add(adamw, BFLOAT16, FLOAT32, False)
    return cases


CASES = _cases()


# ---- how it is compiled ----


def compiled(case: str, target: str) -> list[Kernel]:
    """The kernels that `case` launches, compiled for `target`."""
    import triton
    from triton.backends.compiler import GPUTarget

    launches = []
    with mock.patch.object(
        triton.JITFunction, "run", lambda kernel, *args, **options: launches.append((kernel, args, options))
    ):
        CASES[case]()
    kernels = []
    for kernel, args, options in launches:
        warps = options["num_warps"]
        result = triton.compile(source(kernel, args), target=GPUTarget(*TARGETS[target]), options={"num_warps": warps})
        registers, stack = nvidia_resources(result) if target.startswith("sm_") else amd_resources(result)
        assembly = result.asm["ptx"] if target.startswith("sm_") else result.asm["amdgcn"]
        wide = len(
            re.findall(r"(?:ld|st)\.global\.\S*(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|(?:load|store)_dwordx4", assembly)
        )
        kernels.append(Kernel(kernel.fn.__name__, warps, registers, stack, result.metadata.shared, wide))
    return kernels


def source(kernel: object, args: tuple) -> object:
    """`kernel` specialised for `args` as Triton's launcher does it: None, 1 and constexprs are constants, and addresses
    and integers that are multiples of 16 are promised to be."""
    from triton.compiler import ASTSource

    signature, constants, promises = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        name = parameter.name
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            element = {FLOAT32: "fp32", BFLOAT16: "bf16", FLOAT16: "fp16", torch.int64: "i64"}[value.dtype]
            signature[name] = f"*{element}"
            if value.data_ptr() % 16 == 0:
                promises[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                promises[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, promises)


def nvidia_resources(result: object) -> tuple[int, int]:
    """(registers per thread, bytes of stack per thread). Spilled registers go to the stack; these kernels have no other
    use for one."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def amd_resources(result: object) -> tuple[int, int]:
    """(vector registers per thread, bytes of scratch per thread), from the metadata of the code object."""
    fields = dict(
        re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", result.asm["amdgcn"])
    )
    spilled = 4 * int(fields["vgpr_spill_count"])
    return int(fields["vgpr_count"]), max(spilled, int(fields["private_segment_fixed_size"]))


def all_compiled() -> dict[tuple[str, str], list[Kernel]]:
    """(case, target) → kernels, two processes at a time."""
    jobs = list(product(CASES, TARGETS))
    with ProcessPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(compiled, *zip(*jobs, strict=True), chunksize=4), strict=True))


def main() -> None:
    for (case, target), kernels in all_compiled().items():
        for kernel in kernels:
            if "--json" in sys.argv:
                print(json.dumps({"case": case, "target": target, **asdict(kernel)}))
            else:
                print(f"{case:<42} {target:<7} " + "  ".join(f"{key} {value}" for key, value in asdict(kernel).items()))


if __name__ == "__main__":
    main()
