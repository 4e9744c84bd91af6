"""The shortest time in which this machine could do a piece of work, and how close a measurement comes to it."""

from llmsys.perf.ceilings import Bandwidth


def attainable_s(
    bandwidth: Bandwidth,
    *,
    read_bytes: float = 0,
    written_bytes: float = 0,
    flops: float = 0,
    flops_per_s: float = float("inf"),
) -> float:
    """Seconds that the slower of memory and arithmetic needs at its measured ceiling.

    Memory time: equal amounts read and written go at the copy bandwidth, the rest at the read or the write bandwidth.

    Source     Williams, Waterman & Patterson 2009, "Roofline", CACM 52(4)
    """
    paired = min(read_bytes, written_bytes)
    memory_s = 2 * paired / bandwidth.copy
    memory_s += (read_bytes - paired) / bandwidth.read + (written_bytes - paired) / bandwidth.write
    return max(memory_s, flops / flops_per_s)


def percent(attainable: float, measured: float) -> float:
    """`attainable` seconds as a percentage of the `measured` seconds: 100 is the ceiling."""
    return 100 * attainable / measured
