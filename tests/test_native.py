"""The native module: what it needs, what it leaks, whose threads it runs on."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmsys import _C, rms_norm

ROOT = Path(__file__).parent.parent
OBJECTS = ROOT / "build" / f"native-{sys.implementation.cache_tag}" / "CMakeFiles"

needs_binutils = pytest.mark.skipif(not shutil.which("nm"), reason="binutils (nm, readelf) are not installed")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_binutils
def test_links_no_torch():
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", _C.__file__))
    assert needed and not [name for name in needed if re.match(r"lib(torch|c10|ATen)", name)], needed
    undefined = output("nm", "-D", "--undefined-only", "-C", _C.__file__)
    assert not re.search(r"\b(at|c10|torch)::", undefined), undefined


@needs_binutils
def test_shares_no_streams():
    """Streams of C++ take their locales from whichever libstdc++ of the process came first: a crash where it is another
    than the module was built with."""
    symbols = output("nm", "-D", "-C", _C.__file__)
    assert not re.search(r"\bstd::(basic_[io]?f?stream|locale)\b", symbols), symbols


@needs_binutils
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_wide_instructions_do_not_leak(isa):
    """A weak symbol compiled for a wide machine could replace the baseline's at link time: each names its ISA."""
    objects = sorted((OBJECTS / f"cpu_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"no objects under {OBJECTS}: llmsys was not built in this checkout")
    for path in objects:
        for line in output("nm", "-C", str(path)).splitlines():
            if re.search(r" [WVu] ", line):
                assert f"llmsys::cpu::{isa}::" in line, f"{path.name}: {line}"


@needs_binutils
def test_baseline_holds_baseline_instructions_only():
    objects = sorted((OBJECTS / "cpu_baseline.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"no objects under {OBJECTS}: llmsys was not built in this checkout")
    for path in objects:
        assert not re.search(r"%[yz]mm\d|\bv[a-z]+ps\b", output("objdump", "-d", str(path))), path.name


def test_one_openmp_runtime():
    """Threads are torch's: one runtime is mapped, and torch.set_num_threads is honoured."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("/proc/self/maps is not there to read")
    code = (
        "import torch, llmsys; x = torch.ones(4096, 4096); llmsys.rms_norm(x, torch.ones(4096)); x @ x;"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]}))"
    )
    mapped = output(sys.executable, "-c", code).split()
    assert len(mapped) == 1, mapped
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert _C.cpu.threads() == count
    finally:
        torch.set_num_threads(before)


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"select_isa: \"sse9\", expected one of"):
        _C.cpu.select_isa("sse9")


@pytest.mark.parametrize("isa", _C.cpu.isas())
def test_environment_picks_the_instruction_set(isa):
    code = "from llmsys import _C; import llmsys; print(_C.cpu.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"LLMSYS_CPU_ISA": isa, "PATH": ""}, cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.strip() == isa, run.stderr


def test_interpreter_lock_is_released():
    """Another Python thread runs while a kernel does."""
    import threading

    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1

    x, weight = torch.ones(8192, 4096), torch.ones(4096)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = ticks[0]
        rms_norm(x, weight)
        assert ticks[0] > before
    finally:
        stop.set()
        thread.join()
