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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from types import ModuleType
from unittest import mock

import torch

import llmsys  # noqa: F401  (defines the ops)
from llmsys.ops import _triton
from llmsys.ops._op import ListOp, Op, get, names

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


ELEMENTS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}


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


@dataclass(frozen=True)
class Case:
    """One call of an op's Triton implementation."""

    op: str
    direction: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    variant: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        long = isinstance(get(self.op), ListOp) and len(self.shape) > 4
        sizes = f"{len(self.shape)}x{self.shape[0]}" if long else "x".join(map(str, self.shape))
        options = ["=".join(map(str, pair)) for pair in self.variant]
        return "-".join((self.op, self.direction, sizes, str(self.dtype), *options)).replace("torch.", "")

    @property
    def aligned(self) -> bool:
        """Whether every row of every tensor starts 16 elements after another start, so that accesses can be 16 bytes
        wide."""
        if isinstance(get(self.op), ListOp):
            return all(size % 16 == 0 for size in self.shape)
        args = cases_of(self.op).inputs(self.shape, self.dtype, "meta", **dict(self.variant))
        results = get(self.op).implementations["reference"].forward(*args)
        results = results if isinstance(results, tuple) else (results,)
        return all(t.shape[-1] % 16 == 0 for t in (*args, *results) if isinstance(t, torch.Tensor) and t.dim() > 1)

    def launch(self) -> None:
        op, cases = get(self.op), cases_of(self.op)
        args = cases.inputs(self.shape, self.dtype, "meta", **dict(self.variant))
        if self.direction == "backward":
            args = backward_args(op, args)
        getattr(op.implementations["triton"], self.direction)(*args)


def cases_of(op: str) -> ModuleType:
    return import_module(f"llmsys.ops.{op}.cases")


def backward_args(op: Op, args: tuple) -> tuple:
    """Arguments of the op's backward by name: from the forward's arguments and results, and gradients like these."""
    results = op.implementations["reference"].forward(*args)
    results = dict(zip(op.forward_schema.results, results if isinstance(results, tuple) else (results,), strict=True))
    known = {f"d{name}": tensor for name, tensor in results.items()}
    known |= results | dict(zip(op.forward_schema.names, args, strict=True))
    known |= {name: True for name in op.backward_schema.names if name.startswith("needs_d")}
    return tuple(known[name] for name in op.backward_schema.names)


def cases_of_op(op: Op) -> list[Case]:
    """The first large shape and, where the op has `EDGES`, shapes around the limits of what its kernels keep in
    registers; each variant once, or of these the ones that the op lists in `COMPILED`.
    """
    cases = cases_of(op.name)
    large = cases.LARGE[0]
    shapes = (large, *getattr(cases, "EDGES", ()))
    plan = [(shape, dtype, {}) for shape in shapes for dtype in (torch.bfloat16, torch.float32)]
    plan += [(large, torch.float16, {})]
    plan += [(large, torch.bfloat16, variant) for variant in getattr(cases, "COMPILED", cases.VARIANTS) if variant]
    directions = ("forward", "backward") if op.backward_schema else ("forward",)
    return [
        Case(op.name, direction, shape, dtype, tuple(variant.items()))
        for direction in directions
        for shape, dtype, variant in plan
    ]


OPS = [op for op in map(get, names()) if "triton" in op.implementations]
CASES = {str(case): case for op in OPS for case in cases_of_op(op)}


def targets_of(name: str) -> tuple[str, ...]:
    """Every target for the large shapes in bfloat16; one of each maker for the other cases."""
    case = CASES[name]
    first = case.dtype == torch.bfloat16 and not case.variant and case.shape == cases_of(case.op).LARGE[0]
    return tuple(TARGETS) if first else ("sm_90", "gfx942")


PLAN = [(name, target) for name in CASES for target in targets_of(name)]


# ---- how it is compiled ----


def launches(case: Case, target: str) -> list[tuple[object, tuple, dict]]:
    """(kernel, arguments, compiler options) of each launch of `case` on a GPU like `target`."""
    import triton

    found = []

    def record(kernel: object, *args: object, grid: object, warmup: bool, **options: object) -> None:
        found.append((kernel, args, options))

    kind = "sm_90" if target == "sm_100" else target
    with (
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch.object(_triton, "architecture", lambda device: kind),
    ):
        case.launch()
    return found


def compiled(name: str, index: int, target: str) -> Kernel:
    """The kernel of one launch of a case, compiled for `target`."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, args, options = launches(CASES[name], target)[index]
    result = triton.compile(source(kernel, args), target=GPUTarget(*TARGETS[target]), options=options)
    registers, stack = nvidia_resources(result) if target.startswith("sm_") else amd_resources(result)
    assembly = result.asm["ptx"] if target.startswith("sm_") else result.asm["amdgcn"]
    wide = r"(?:ld|st)\.global\.\S*(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|(?:load|store)_dwordx4"
    count = len(re.findall(wide, assembly))
    return Kernel(kernel.fn.__name__, options["num_warps"], registers, stack, result.metadata.shared, count)


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
            signature[name] = f"*{ELEMENTS[value.dtype]}"
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
    """(case, target) → kernels. Launches that Triton compiles to the same object are compiled once, two processes at a
    time.
    """
    first: dict[tuple[str, str], tuple[str, int]] = {}  # what is compiled, and for what → the first launch of it
    keys: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, target in PLAN:
        keys[name, target] = []
        for index, (kernel, args, options) in enumerate(launches(CASES[name], target)):
            key = f"{kernel.cache_key} {source(kernel, args).hash()} {options}", target
            first.setdefault(key, (name, index))
            keys[name, target].append(key)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:  # a fork would inherit the locks of torch's threads
        jobs = [(*first[key], key[1]) for key in first]
        kernels = pool.map(compiled, *zip(*jobs, strict=True), chunksize=4)
    found = dict(zip(first, kernels, strict=True))
    return {case: [found[key] for key in keys[case]] for case in PLAN}


def main() -> None:
    for (case, target), kernels in all_compiled().items():
        for kernel in kernels:
            if "--json" in sys.argv:
                print(json.dumps({"case": case, "target": target, **asdict(kernel)}))
            else:
                print(f"{case:<58} {target:<7} " + "  ".join(f"{key} {value}" for key, value in asdict(kernel).items()))


if __name__ == "__main__":
    main()
