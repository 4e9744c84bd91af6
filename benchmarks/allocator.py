"""Measuring in a process that keeps freed memory, as one that trains does: no page faults in fresh outputs."""

from llmsys.memory import tune_allocator


def keep_freed_memory() -> None:
    """`llmsys.memory.tune_allocator()`, for implementations and peers alike.

    Errors     RuntimeError where the C library is not glibc
    """
    if not tune_allocator():
        raise RuntimeError("benchmarks.allocator: the C library is not glibc, expected glibc; measure as it is")
