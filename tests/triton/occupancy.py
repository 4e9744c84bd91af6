"""`python -m tests.triton.occupancy`: what attention's Triton kernels ask of an SM, compiled without a GPU, and how
many of its warps they leave room for. `--record` keeps it in `benchmarks/records`.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import torch

from llmsys.perf.report import command_line, environment, record, record_path, write_record
from tests.triton.compiled import CASES, Case, Kernel, cases_of, compiled, launches

# Of an SM: registers, warps and blocks; bytes of shared memory, of which the driver keeps 1 KiB a block.
# Source     NVIDIA, CUDA C++ Programming Guide, technical specifications per compute capability
REGISTERS, WARPS, BLOCKS, KEPT = 65536, 64, 32, 1024
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}


def blocks_of(kernel: Kernel, target: str) -> int:
    """How many blocks of `kernel` an SM holds at once. A warp takes registers in lots of 256."""
    registers = kernel.warps * -(-kernel.registers * 32 // 256) * 256
    return min(REGISTERS // registers, SHARED[target] // (kernel.shared + KEPT), WARPS // kernel.warps, BLOCKS)


def plan() -> list[tuple[str, int, str]]:
    """(case, launch, target): causal attention in bfloat16 with heads of 128 and of 64, forward and backward."""
    large = cases_of("attention").LARGE
    cases = [
        Case("attention", direction, shape, torch.bfloat16)
        for shape in (large[0], large[1])
        for direction in ("forward", "backward")
    ]
    CASES.update({str(case): case for case in cases})  # where `compiled` looks them up
    return [
        (str(case), index, target)
        for target in SHARED
        for case in cases
        for index in range(len(launches(case, target)))
    ]


def measured(case: str, index: int, target: str) -> dict[str, object]:
    plan()  # in this process, too
    kernel = compiled(case, index, target)
    found = {"case": case, "target": target, "head_dim": CASES[case].shape[-1], **asdict(kernel)}
    return found | {"warps_of_sm": blocks_of(kernel, target) * kernel.warps}


def main() -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        kernels = list(pool.map(measured, *zip(*plan(), strict=True)))
    for kernel in kernels:
        print("  ".join(f"{key} {value}" for key, value in kernel.items()))
    if "--record" in sys.argv:
        content = record(environment(command_line()), (), suite="occupancy", kernels=kernels)
        write_record(record_path(content), content)
        print(f"wrote {record_path(content)}")


if __name__ == "__main__":
    main()
