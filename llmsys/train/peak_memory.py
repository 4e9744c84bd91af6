"""The most memory this process has held since a moment, as the operating system counts it."""

import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """`extra_bytes()` is the highest resident size since construction, less the resident size at construction.

    On a GPU it is what torch has allocated there. On Linux the peak is the kernel's own (VmHWM), set back to the
    present size through /proc/self/clear_refs. Elsewhere it is `ru_maxrss`, which cannot be set back: the figure is
    then what the peak rose by.
    """

    def __init__(self, device: str = "cpu"):
        self.gpu = None if device == "cpu" else device
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(self.gpu)
        self.linux = sys.platform == "linux"
        if self.linux:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: 5 resets the peak
        self.start_bytes = self._bytes("VmRSS")

    def extra_bytes(self) -> int:
        if self.gpu:
            return torch.cuda.max_memory_allocated(self.gpu)
        return self._bytes("VmHWM") - self.start_bytes

    def _bytes(self, key: str) -> int:
        if not self.linux:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"llmsys.train.PeakMemory: /proc/self/status without {key}, expected Linux 4.0 or later")
