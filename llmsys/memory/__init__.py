"""Memory of the host and of the device: where it comes from and how long it is kept."""

from llmsys.memory.allocator import allocator_state, tune_allocator
from llmsys.memory.recompute import recompute

__all__ = ["allocator_state", "recompute", "tune_allocator"]
