import platform
import subprocess
import sys

import pytest

from llmsys.memory import allocator_state, tune_allocator

FAULTS = """
import ctypes
import resource, sys, torch
from llmsys.memory import tune_allocator
if sys.argv[1] == "tuned":
    assert tune_allocator()
else:
    ctypes.CDLL(None).mallopt(-3, 8 << 20)  # a fixed threshold: glibc's own creeps up to the largest block freed
for _ in range(20):  # small blocks settle in the first holes
    torch.ones(4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(4 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    run = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    """Five 16 MiB tensors, one after the other: fresh pages each time, or none."""
    assert page_faults("tuned") < 100 < page_faults("plain")


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert tune_allocator() is False
    assert "left as it is" in allocator_state()
