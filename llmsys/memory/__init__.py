"""Memory of the host and of the device: where it comes from and how long it is kept."""

from llmsys.memory.allocator import allocator_state, tune_allocator

__all__ = ["allocator_state", "tune_allocator"]
