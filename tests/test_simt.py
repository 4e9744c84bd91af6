"""The simulator catches what it promises to; the CUDA kernels pass under it; nvcc compiles them without spills."""

import hashlib
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module

import pytest
import torch

from llmsys.ops import _op, _verify
from llmsys.ops.adamw import cases as adamw
from tests import build, simt
from tests.harness import same_bits, shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOURCES = sorted((simt.ROOT / "csrc" / "cuda").glob("*.cu"))


def has_kernel(name: str) -> bool:
    """Whether the op has CUDA sources, which the simulator then runs."""
    simt.register(_op.get(name))
    simulated = _op.get(name).implementations.get("cuda_simt")
    return simulated is not None and simulated.why_not(torch.ones(1, dtype=torch.bfloat16)) in (None, simt.why_not())


SIMULATED = [name for name in _op.names() if has_kernel(name)]
CASES = {name: import_module(f"llmsys.ops.{name}.cases") for name in SIMULATED if name != "adamw"}  # which takes lists

needs_simulator = pytest.mark.skipif(bool(simt.why_not()), reason=str(simt.why_not()))

# Kernel of faults.cu → what the simulator says of its mistake.
THREAD = r"thread \(\d+, 0, 0\)"
RACE = rf"{THREAD}: reads values\[\d+\], which (nobody has written|{THREAD} wrote, with no barrier between)"
REUSE = rf"{THREAD}: (reads|writes) values\[\d+\], which {THREAD} (wrote|read), with no barrier between"
COPY = rf"{THREAD}: (reads|writes) values\[\d+\], to which {THREAD} copies and has not waited"
SHUFFLE = r"__shfl_xor_sync \(.*faults\.cu:\d+\) with mask 0x"
FAULTS = {
    "missing_barrier": RACE,
    "missing_barrier_before_reuse": REUSE,
    "missing_barrier_in_global_memory": "wrong result",
    "missing_syncwarp": RACE,
    "divergent_barrier": rf"reaches __syncthreads \(.*\), while {THREAD} waits at __syncthreads",
    "barrier_after_exit": r"(exits, while thread|reaches __syncthreads .* but a thread of its block has exited)",
    "divergent_shuffle": rf"(exits, while lanes wait for it at {SHUFFLE}|calls {SHUFFLE}\w+, but lanes .* exited)",
    "shuffle_against_barrier": rf"its threads wait for each other: .*thread \(1, 0, 0\) at {SHUFFLE}",
    "shuffle_masks_differ": rf"calls {SHUFFLE}\w+, while lanes 0x\w+ wait at {SHUFFLE}",
    "shuffle_reads_outside_mask": rf"calls {SHUFFLE}\w+ to read lane \d+, which it leaves out",
    "unwritten_shared_memory": r"reads values\[0\], which nobody has written",
    "shared_out_of_bounds": r"(reads|writes) values\[63\], out of bounds: the array has 63 elements",
    "dynamic_shared_out_of_bounds": r"writes dynamic shared memory\[64\], out of bounds: the array has 64 elements",
    "too_much_shared_memory": r"declares values, which makes 260 bytes .* the launch's 166656: more than a block has",
    "missing_wait": COPY,
    "missing_commit": COPY,
    "missing_barrier_after_wait": rf"{RACE}|{COPY}",
    "missing_barrier_before_copy": rf"{REUSE}|{COPY}",
    "exit_before_wait": r"exits, with asynchronous copies that it has not waited for",
    "divergent_mma": r"(exits, while lanes wait for it at mma|calls mma .* with mask 0x\w+, but lanes .* exited)",
}
SANITIZED_FAULTS = {
    "global_out_of_bounds": r"(?s)heap-buffer-overflow.*WRITE of size 4.*in block \(0, 0, 0\), thread \(0, 0, 0\)",
    "unaligned_vector": r"misaligned address 0x\w+ for type 'const struct Vector', which requires 16 byte alignment",
}


@cache
def faults(*flags: str):
    """faults.cu compiled with `flags`."""
    return simt.program(simt.HERE / "faults.cu", flags)


def outcome(kernel: str, version: str, seed: int, flags: tuple = ()) -> str:
    command = [faults(*flags), kernel, version, str(seed)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return (run.stdout + run.stderr).strip()


@needs_simulator
@pytest.mark.parametrize("kernel", FAULTS)
def test_mistake_is_caught_in_any_order(kernel):
    for seed in range(8):
        assert outcome(kernel, "right", seed) == "right"
        assert re.search(FAULTS[kernel], outcome(kernel, "wrong", seed)), seed


@needs_simulator
@pytest.mark.parametrize("kernel", [*SANITIZED_FAULTS, "divergent_shuffle", "shared_out_of_bounds"])
def test_mistake_is_caught_by_sanitizers(kernel):
    """Also that a fault reported by an exception leaves AddressSanitizer content with the stacks."""
    expected = {**FAULTS, **SANITIZED_FAULTS}[kernel]
    assert outcome(kernel, "right", 0, simt.SANITIZE) == "right"
    assert re.search(expected, outcome(kernel, "wrong", 0, simt.SANITIZE))


@needs_simulator
def test_tensor_cores_multiply():
    """Fragments lie in the lanes as PTX has them."""
    program = simt.program(simt.HERE / "products.cu")
    assert subprocess.run([program], capture_output=True, text=True, timeout=60).stdout.strip() == "right"


@needs_simulator
def test_machines_without_our_own_switch_of_stacks():
    for kernel in ("missing_barrier", "divergent_shuffle"):
        assert outcome(kernel, "right", 0, ("-DSIMT_UCONTEXT",)) == "right"
        assert re.search(FAULTS[kernel], outcome(kernel, "wrong", 0, ("-DSIMT_UCONTEXT",)))


def barriers() -> list[tuple[str, int]]:
    """(file, line) of every barrier and every wait for copies of csrc/cuda."""
    files = sorted((simt.ROOT / "csrc" / "cuda").iterdir())
    lines = (
        (file.name, i)
        for file in files
        for i, line in enumerate(file.read_text().splitlines(), 1)
        if "__syncthreads();" in line or "wait_for_copies<0>();" in line
    )
    return list(lines)


def differs_or_fails() -> bool:
    """Whether any of the ops, at a shape whose rows take several warps, is wrong or is stopped by the simulator."""
    tried = [(name, shape, {}) for name, cases in CASES.items() for shape in shapes(cases, (10, 600))]
    # Several tiles of keys, and two sequences with one bias.
    tried += [("attention", (1, 100, 103, 2, 1, 64, 64), {}), ("attention", (2, 9, 9, 1, 1, 8, 8), {"bias": "head"})]
    try:
        return not all(
            verdict.right
            for name, shape, variant in tried
            for verdict in _verify.verify(_op.get(name), CASES[name], "cuda_simt", shape, torch.bfloat16, **variant)
        )
    except RuntimeError as error:
        faults = ("with no barrier between", "which nobody has written", "has not waited")
        return any(fault in str(error) for fault in faults)


@needs_simulator
@pytest.mark.parametrize("barrier", barriers(), ids=lambda barrier: "{}:{}".format(*barrier))
def test_each_barrier_of_our_kernels_is_missed(barrier):
    with simt.without_barrier(*barrier):
        assert differs_or_fails()
    assert not differs_or_fails()


def taken(name: str) -> list[torch.dtype]:
    """The dtypes that the op's CUDA kernels take."""
    why_not = _op.get(name).implementations["cuda_simt"].why_not
    return [dtype for dtype in DTYPES if why_not(torch.ones(1, dtype=dtype)) in (None, simt.why_not())]


@needs_simulator
@pytest.mark.parametrize("name, dtype", [(name, dtype) for name in CASES for dtype in taken(name)], ids=str)
def test_long_rows(name, dtype):
    """Rows that fill a block's registers, and rows longer than that, by vectors and by single elements."""
    for shape in shapes(CASES[name], (3, 2051), (2, 8200), (2, 16392), (66, 264)):
        for verdict in _verify.verify(_op.get(name), CASES[name], "cuda_simt", shape, dtype):
            assert verdict.right, f"{shape}: {verdict}"


@needs_simulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tensors_than_a_launch_holds(dtype):
    """Launches of 64, among them tensors of several blocks, of one element and of none."""
    shape = (3,) * 62 + (9000, 0, 1, 4096) + (4097,) + (2,) * 64
    for verdict in _verify.verify(_op.get("adamw"), adamw, "cuda_simt", shape, dtype, masters=True):
        assert verdict.right, str(verdict)


@needs_simulator
@pytest.mark.parametrize("name", CASES)
def test_order_of_threads_does_not_show(name):
    """The same bits whatever the order of blocks and threads."""
    (shape,) = shapes(CASES[name], (70, 600))
    op, dtype = _op.get(name), taken(name)[0]
    args = CASES[name].inputs(shape, dtype)
    first = dict(_verify.run(op, "cuda_simt", args, 0, dtype))
    try:
        for seed in (1, 2, 3):
            simt.seed(seed)
            for key, result in _verify.run(op, "cuda_simt", args, 0, dtype):
                assert same_bits(result, first[key]), (key, seed)
    finally:
        simt.seed(0)


@needs_simulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_have_the_bits_of_pytorch(dtype):
    """Every bit pattern to float32, and sums of pairs of them back, rounded to nearest even."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = patterns.view(dtype).view(64, -1)
    residual = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(dtype).view(64, -1)
    weight = torch.ones(x.shape[-1], dtype=dtype)
    forward = _op.get("add_rms_norm").implementations["cuda_simt"].forward
    for added in (torch.zeros_like(x), residual):
        expected = (x.float() + added.float()).to(dtype)
        _, result, _ = forward(x, added, weight, 1e-6, 0.0)
        assert torch.equal(result.isnan(), expected.isnan())
        assert same_bits(result[~result.isnan()], expected[~expected.isnan()])


@needs_simulator
def test_ops_under_address_sanitizer():
    """Every access of every kernel stays within its tensor, and vectors are aligned, at sizes of all kinds."""
    files = [f"tests/ops/test_{name}.py" for name in SIMULATED]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "cuda_simt and any_layout"]
    run = subprocess.run(command, cwd=simt.ROOT, env=build.sanitized_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in SIMULATED:
        assert re.search(rf"{name} +cuda_simt +executed", run.stdout), run.stdout


@needs_simulator
def test_launch_that_cuda_refuses():
    """More blocks than a grid has is CUDA's error, with CUDA's words."""
    ones = torch.ones(1)
    pointers = (ones.data_ptr(),) * 5
    with pytest.raises(RuntimeError, match=r"llmsys\.cuda\.rms_norm_backward: invalid configuration argument"):
        simt.module().cuda.rms_norm_backward(
            0, pointers[0], 0, *pointers[:3], *pointers[:3], 1, 1, 2**31, 1, 0, 1, 0, 0, 0, 1, 0.0, 0, 0
        )


# ---- nvcc ----

GPUS = ("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a")
NVCC = ("nvcc", "-std=c++17", "--fmad=false", *GPUS, "-Xptxas", "-v")
MAX_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor
MAX_REGISTERS_OF_TILES = 255  # two blocks of 128, or one of 256, which keep tiles of sums


@cache
def ptxas_reports() -> dict[str, str]:
    """Source → what ptxas says of its kernels, kept in build/simt; all sources are compiled side by side."""
    headers = sorted([*(simt.ROOT / "csrc").glob("*.h"), *(simt.ROOT / "csrc" / "cuda").glob("*.cuh")])
    build.BUILD.mkdir(parents=True, exist_ok=True)
    kept, running = {}, {}
    for source in SOURCES:
        read = [" ".join(NVCC).encode(), *(path.read_bytes() for path in [*headers, source])]
        key = hashlib.sha256(b"".join(read)).hexdigest()[:16]
        report = kept[source.stem] = build.BUILD / f"{source.stem}-{key}.ptxas"
        if not report.exists():
            command = [*NVCC, "-c", str(source), "-o", report.with_suffix(".o")]
            running[report] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for report, process in running.items():
        output, _ = process.communicate()
        assert process.returncode == 0, output
        report.write_text(output)
    return {name: report.read_text() for name, report in kept.items()}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_nvcc_compiles_without_spills(source):
    report = ptxas_reports()[source.stem]
    for gpu in ("sm_80", "sm_90a"):
        assert f"for '{gpu}'" in report
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers and len(spills) >= len(registers)
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= (MAX_REGISTERS_OF_TILES if source.stem.startswith("attention") else MAX_REGISTERS)
